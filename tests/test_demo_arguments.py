"""A wrong command line of the demonstration gets one clear line, beside those that `test_demo` tries."""

from __future__ import annotations

import pytest
import train_free_demo

HUGE = str(10**30)


@pytest.mark.parametrize(("arguments", "words"), [
    (["--max-tokens", HUGE], "--max-tokens must be at most"),
    (["--max-tokens", "-1"], "max_tokens must be at least 1, got -1"),
    (["--max-tokens", "1.5"], "argument --max-tokens: invalid int value: '1.5'"),
    (["--num-blocks", "0"], "num_blocks must be at least 1, got 0"),
    (["--num-blocks", HUGE], "num_blocks must be from"),
    (["--num-blocks", str(2**27)], "there is no memory for a KV cache"),
    (["--block-size", "0"], "block_size must be from 8 to 256, got 0"),
    (["--block-size", "-16"], "block_size must be from 8 to 256, got -16"),
    (["--block-size", HUGE], "block_size must be from 8 to 256"),
    (["--seed", "x"], "argument --seed: invalid int value"),
    (["--temperature", "inf"], "temperature must be finite"),
    (["--temperature", "-1"], "temperature must be from 0.0"),
    (["--temperature", ""], "argument --temperature: invalid float value"),
    (["--device", ""], "device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got ''"),
    (["--prompt", "\ud83d"], "lone surrogate"),
    (["--prompt", "a", "--num-blocks", "4", "--max-tokens", HUGE], "can never fit"),
    (["--prompt"], "expected one argument"),
    (["--nonsense"], "unrecognized arguments: --nonsense"),
    (["stray"], "unrecognized arguments: stray"),
])
def test_a_wrong_command_line_gets_one_clear_last_line_and_status_2(
    capsys: pytest.CaptureFixture, arguments: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        train_free_demo.main(arguments)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err.strip().splitlines()[-1]
