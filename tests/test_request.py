"""What is one request? What it knows of itself."""

from __future__ import annotations

import pytest

from nanopaged.request import Request, RequestStatus
from nanopaged.sampling_params import SamplingParams


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="the prompt is empty"):
        Request("0", [], SamplingParams())


def test_a_request_keeps_its_own_copy_of_the_prompt() -> None:
    prompt = [1, 2, 3]
    request = Request("0", prompt, SamplingParams())
    request.receive(4, now=1.0)
    assert prompt == [1, 2, 3] and request.token_ids == [1, 2, 3, 4]
    assert (request.output_token_ids, request.num_output_tokens, request.num_prompt_tokens) == ([4], 1, 3)


@pytest.mark.parametrize("ignore_eos, stops", [(False, {7, 9}), (True, {7})])
def test_the_end_of_text_is_a_stop_token_unless_it_is_ignored(ignore_eos: bool, stops: set[int]) -> None:
    assert Request("0", [1], SamplingParams(stop_token_ids=[7], ignore_eos=ignore_eos), 9).stop_token_ids == stops
    assert Request("0", [1], SamplingParams(stop_token_ids=[7]), None).stop_token_ids == {7}


def test_the_times_of_the_first_and_the_last_token_are_noted() -> None:
    request = Request("0", [1], SamplingParams())
    metrics = request.metrics
    assert metrics.time_to_first_token_s is None and metrics.time_between_tokens_s is None
    metrics.arrival_time = 2.0
    request.receive(5, now=3.0)
    assert metrics.time_to_first_token_s == 1.0 and metrics.time_between_tokens_s is None
    request.receive(5, now=4.0)
    request.receive(5, now=7.0)
    assert metrics.time_to_first_token_s == 1.0 and metrics.time_between_tokens_s == 2.0
    assert metrics.output_tokens == 3


def test_requests_are_ordered_by_their_keys() -> None:
    first, second = Request("b", [1], SamplingParams()), Request("a", [1], SamplingParams())
    first.key, second.key = (0.0, 5, 0), (0.0, 6, 0)
    assert sorted([second, first]) == [first, second]


def test_a_follower_takes_a_seat_of_its_leader_until_it_starts() -> None:
    leader = Request("0.0", [1], SamplingParams(n=3), group_id="0")
    leader.followers = [Request("0.1", [1], SamplingParams(n=3)), Request("0.2", [1], SamplingParams(n=3))]
    assert leader.num_seats == 3 and leader.followers[0].num_seats == 1


def test_a_request_says_in_one_line_where_it_stands() -> None:
    request = Request("7.0", [1, 2, 3], SamplingParams())
    request.receive(4, now=0.0)
    request.status, request.num_computed_tokens = RequestStatus.RUNNING, 3
    request.block_table.append(5)
    assert repr(request) == "Request('7.0', running, prompt=3, output=1, computed=3, blocks=[5])"
