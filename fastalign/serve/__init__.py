"""The service that answers people and keeps what they think of the answers."""
