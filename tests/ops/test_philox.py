"""The noise: Philox4x32-10 against published vectors, the normals against float64 Box-Muller."""

import math

import pytest
import torch

from fastdiff.ops import seeded_noise
from fastdiff.ops.philox import box_muller, philox_normal_ref, philox_words

WORD = 2**32


def words(*values):
    return tuple(torch.tensor([v]) for v in values)


# Known answers of the authors' Random123 library (kat_vectors, philox4x32 10 rounds).
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((WORD - 1,) * 4, (WORD - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers(counter, key, expected):
    got = philox_words(words(*counter), words(*key))
    assert tuple(int(w) for w in got) == expected


def box_muller_float64(u, w):
    """Textbook Box-Muller in float64; 1 - U is exact, so log1p keeps the end near U = 1."""
    rest = (WORD - 1 - u).double() / WORD
    radius = torch.sqrt(-2 * torch.log1p(-rest))
    angle = 2 * math.pi * w.double() / WORD
    return radius * torch.cos(angle), radius * torch.sin(angle)


EDGES = torch.tensor(
    [0, 1, 2, 3, WORD - 1, WORD - 2]
    + [
        min(max(int(x) + d, 0), WORD - 1)
        for k in range(33)
        for x in (2**k, 2 ** (k + 0.5))
        for d in (-2, -1, 0, 1, 2)
    ]
)
EIGHTHS = torch.tensor([(i * 2**29 + d) % WORD for i in range(8) for d in range(-3, 4)])


@pytest.mark.parametrize("part", ["uniform", "small u", "large u", "edges of u", "edges of w"])
def test_normals_are_accurate(part):
    n = 50_000
    u, w = torch.randint(WORD, (n,)), torch.randint(WORD, (n,))
    if part == "small u":
        u = torch.arange(n)
    elif part == "large u":
        u = WORD - 1 - torch.arange(n)
    elif part == "edges of u":
        u, w = torch.cartesian_prod(EDGES, torch.randint(WORD, (64,))).unbind(1)
    elif part == "edges of w":
        u, w = torch.cartesian_prod(torch.randint(WORD, (64,)), EIGHTHS).unbind(1)
    for got, exact in zip(box_muller(u, w), box_muller_float64(u, w), strict=True):
        assert got.dtype == torch.float32
        error = (got.double() - exact).abs()
        assert (error <= 3e-7 * exact.abs().clamp(min=1)).all(), error.max()
        assert error.square().mean().sqrt() < 2e-7


def test_radius_ends():
    longest, _ = box_muller(*words(0, 0))
    assert longest.item() == pytest.approx(math.sqrt(64 * math.log(2)), rel=1e-7)
    assert box_muller(*words(WORD - 1, 0))[0].item() == 0


def test_lanes_and_counter():
    """Element e is lane e % 4 of counter (e // 4, stage, purpose); both seed halves are the key."""
    seed, stage, purpose = -0x1234_5678_9ABC_DEF0, 3, 1
    z = philox_normal_ref(torch.tensor([seed]), 11, stage, purpose)[0]
    key = words(seed % WORD, (seed >> 32) % WORD)
    for element in range(11):
        u0, u1, u2, u3 = philox_words(words(element // 4, 0, stage, purpose), key)
        lanes = (*box_muller(u0, u1), *box_muller(u2, u3))
        assert z[element] == lanes[element % 4]


def test_numbers_are_distributed_normally():
    z = philox_normal_ref(torch.arange(1000, 1008), 50_000, 0, 1).double()
    n = z.numel()
    # Moments within 4.5 standard errors, Kolmogorov's distance within its 1e-5 quantile.
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(z.pow(power).mean() - mean) < 4.5 * math.sqrt(variance / n)
    ordered = z.flatten().sort().values
    cdf = 0.5 * torch.erfc(-ordered / math.sqrt(2))
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((cdf - steps[:-1]).abs().max(), (cdf - steps[1:]).abs().max())
    assert distance < 2.47 / math.sqrt(n)
    # Neither lanes nor images nor stages are correlated.
    lanes = z.reshape(-1, 4)
    assert (torch.corrcoef(lanes.T) - torch.eye(4)).abs().max() < 4.5 / math.sqrt(n / 4)
    assert (torch.corrcoef(z) - torch.eye(8)).abs().max() < 4.5 / math.sqrt(50_000)
    other = philox_normal_ref(torch.arange(1000, 1008), 50_000, 1, 1).double()
    assert abs((z * other).mean()) < 4.5 / math.sqrt(n)


def test_seeded_noise_is_the_reference():
    seeds = torch.tensor([5, -1, 2**63 - 1, -(2**63)])
    expected = philox_normal_ref(seeds, 3 * 7 * 5, stage=0, purpose=1).view(4, 3, 7, 5)
    assert torch.equal(seeded_noise(seeds, (4, 3, 7, 5)), expected)
    assert torch.equal(seeded_noise(seeds.tolist(), (4, 3, 7, 5)), expected)
    assert torch.equal(seeded_noise(seeds, (4, 3, 7, 5), dtype=torch.float64), expected.double())
    assert torch.equal(seeded_noise(seeds, (4, 3, 7, 5), dtype=torch.bfloat16), expected.bfloat16())


def test_noise_depends_on_the_seed_alone():
    seeds = torch.tensor([3, 1, 4, 1, 5])
    batch = seeded_noise(seeds, (5, 3, 9, 9))
    alone = seeded_noise(seeds[2:3], (1, 3, 9, 9))
    assert torch.equal(batch[2:3], alone)
    assert torch.equal(batch[1], batch[3])
    assert not torch.equal(batch[0], batch[1])


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0), (3,), (1, 1), (2, 1025)])
def test_noise_shapes(shape):
    seeds = torch.arange(shape[0])
    noise = seeded_noise(seeds, shape)
    expected = philox_normal_ref(seeds, math.prod(shape[1:]), 0, 1).view(shape)
    assert torch.equal(noise, expected)


@pytest.mark.parametrize(
    ("error", "match", "arguments", "options"),
    [
        (ValueError, r"seeds must have the shape \(3,\), got \(2,\)", ([1, 2], (3, 4)), {}),
        (TypeError, "seeds must be torch.int64", ([1.0, 2.0], (2, 4)), {}),
        (TypeError, "dtype must be a floating", ([1, 2], (2, 4)), {"dtype": torch.int32}),
    ],
)
def test_bad_noise_arguments_are_named(error, match, arguments, options):
    with pytest.raises(error, match=match):
        seeded_noise(*arguments, **options)
