"""The loop that learns from feedback: collect, train, measure, promote or not, and watch what people say of the new version."""
