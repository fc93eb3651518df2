"""Where do a request's random numbers come from?

Not from a generator, whose next number depends on who asked before. Each number is a hash of what it is
for: of a request's seed, the index of the token that is drawn, and the token id. So all of them can be
computed at once, in any order, on any device, again and again (counter-based random numbers: Salmon et
al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011).
"""

from __future__ import annotations

import torch


def exponentials(keys: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Exponentially distributed numbers (rows, vocab_size), float32, from (2, rows) int32, random bits of each row.

    Integer arithmetic makes their bits the same on every machine; only the logarithm may be rounded differently.
    """
    ids = torch.arange(vocab_size, dtype=torch.int32, device=keys.device)
    bits = _scramble(_scramble(ids + keys[0, :, None]).bitwise_xor_(keys[1, :, None]))
    return exponential(bits)


def _scramble(x: torch.Tensor) -> torch.Tensor:
    """A bijection of 32 bits in which every input bit moves every output bit, in place.

    Multiply and xorshift, with the constants of Wellons' lowbias32 (Prospecting for Hash Functions, 2018). int32
    products wrap around; its shifts copy the sign, which the masks take away again.
    """
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32)):
        x.bitwise_xor_((x >> shift).bitwise_and_(2 ** (32 - shift) - 1)).mul_(factor)
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def exponential(bits: torch.Tensor) -> torch.Tensor:
    """int32 to float32 of the same shape: -log(1 - u), where u in (0, 1) are the lower 31 bits.

    Positive and finite for every bit pattern. Near 0, where races are won, it is as fine as the bits, 2**-31.
    """
    u = (bits & 0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31)
    return u.clamp_(max=1 - 2.0**-24).neg_().log1p_().neg_()  # the largest float32 below 1
