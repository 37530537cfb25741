"""The judge that the options name."""

import pytest

from fastalign.rollout.judging import JudgeConfig, JudgeReward, build_judge

pytest.importorskip("openai", reason="judges behind an endpoint are unproven here")
from endpoint import Endpoint, prefers_longer


def test_an_endpoint_ranks_the_answers_to_each_prompt_in_both_orders():
    with Endpoint(prefers_longer) as endpoint:
        config = JudgeConfig(url=endpoint.url, model="m", timeout=5.0)
        config.validate()
        reward = JudgeReward(build_judge(config), 3, config.workers)
        scores = reward(prompts=["a"] * 3 + ["b"] * 3, completions=["xx", "x", "xxx", "y", "yyy", "yyy"], completion_ids=[[1]] * 6)
    assert scores == [0.5, 0.0, 1.0, 0.0, 0.75, 0.75]
    assert len(endpoint.requests) == 2 * 3 * 2
