"""PTX on the CPU: instructions against their definitions, errors, and the kernels' tests."""

import json
import math
import random
import re
from fractions import Fraction

import numpy as np
import pytest
import torch

import bench.ptx
from tests.helpers import ptx
from tests.helpers.ptx import Fault, Program

HEAD = """.visible .entry kernel(.param .u64 kernel_param_0, .param .u64 kernel_param_1)
.reqntid {threads}
{{
"""


def run(body, given, wanted, *, threads=32, programs=1, shared=0):
    """Run a kernel's body on two arrays, what is given and what it fills; %rd0, %rd1 are theirs."""
    prologue = "ld.param.b64 %rd0, [kernel_param_0]; ld.param.b64 %rd1, [kernel_param_1];\n"
    prologue += "mov.u32 %r0, %tid.x; cvt.u64.u32 %rd9, %r0;\n"
    program = Program(HEAD.format(threads=threads) + prologue + body + "\nret;\n}\n")
    given = np.ascontiguousarray(given)
    addresses = [array.ctypes.data for array in (given, wanted)]
    program.run(
        (programs, 1, 1),
        [address.to_bytes(8, "little") for address in addresses],
        [(array.ctypes.data, array.nbytes) for array in (given, wanted)],
        shared,
    )
    return wanted


EACH = "shl.b64 %rd8, %rd9, {shift}; add.s64 %rd2, %rd0, %rd8; add.s64 %rd3, %rd1, %rd8;\n"
EACH4, EACH8 = EACH.format(shift=2), EACH.format(shift=3)  # %rd2 and %rd3: a thread's elements
LOAD, STORE = EACH4 + "ld.global.b32 %r1, [%rd2];\n", "\nst.global.b32 [%rd3], %r2;"


def of_each(code, values, dtype=np.uint32, **options):
    """What code makes of %r1 in %r2, for each thread's value."""
    values = np.ascontiguousarray(values)
    return run(
        LOAD + code + STORE, values, np.zeros(len(values), dtype), threads=len(values), **options
    )


# == Order =========================================================================================


def test_lanes_that_leave_a_loop_at_different_times():
    """The sum of 1 .. n, n another for each lane; programs of two warps."""
    loop = """
    mov.b32 %r2, 0;
    setp.eq.b32 %p1, %r1, 0;
    @%p1 bra $done;
    $loop:
    add.s32 %r2, %r2, %r1;
    add.s32 %r1, %r1, -1;
    setp.ne.b32 %p2, %r1, 0;
    @%p2 bra $loop;
    $done:
    """
    numbers = np.arange(64, dtype=np.uint32) * 7 % 13
    assert (of_each(loop, numbers) == numbers * (numbers + 1) // 2).all()


def test_lanes_meet_again_after_both_sides_of_a_branch():
    both = """
    and.b32 %r3, %r1, 1;
    setp.eq.b32 %p1, %r3, 0;
    @%p1 bra $even;
    mul.lo.s32 %r2, %r1, 3;
    bra.uni $join;
    $even:
    shr.u32 %r2, %r1, 1;
    $join:
    bar.sync 0;
    shfl.sync.bfly.b32 %r2, %r2, 1, 31, -1;
    """
    n = np.arange(64, dtype=np.uint32)
    assert (of_each(both, n) == np.where(n % 2, 3 * n, n // 2)[n ^ 1]).all()


def test_some_lanes_return_before_the_others():
    early = "mov.b32 %r2, 7; setp.lt.u32 %p1, %r1, 32; @%p1 ret; bar.sync 0;"
    assert (of_each(early, np.arange(64, dtype=np.uint32)) == [0] * 32 + [7] * 32).all()


def test_a_barrier_that_some_lanes_never_reach():
    parted = "mov.b32 %r2, 0; setp.lt.u32 %p1, %r1, 40; @%p1 bra $on; bar.sync 0; $on:"
    parted = parted.replace("$on:", "\n$on:")
    with pytest.raises(Fault, match="kernel: bar.sync 0: lanes of a program have parted"):
        of_each(parted, np.arange(64, dtype=np.uint32))
    with pytest.raises(Fault, match="lanes of a warp have parted"):
        of_each(parted.replace("bar.sync 0", "shfl.sync.idx.b32 %r2, %r1, 0, 31, -1"),
                np.arange(64, dtype=np.uint32))  # fmt: skip


@pytest.mark.parametrize(
    "kind, by, clamp, wanted",
    [
        ("idx", 5, 31, lambda i: i * 0 + 5),
        ("idx", 3, 0x1C1F, lambda i: i // 4 * 4 + 3),  # in segments of four
        ("bfly", 16, 31, lambda i: i ^ 16),
        ("up", 3, 0, lambda i: np.where(i < 3, i, i - 3)),
        ("down", 3, 31, lambda i: np.where(i > 28, i, i + 3)),
    ],
)
def test_shuffles(kind, by, clamp, wanted):
    values = np.arange(64, dtype=np.uint32)
    found = of_each(f"shfl.sync.{kind}.b32 %r2, %r1, {by}, {clamp}, -1;", values)
    lane = values % 32
    assert (found == values - lane + wanted(lane.astype(int))).all()


# == Numbers =======================================================================================

HARD = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-40, 2.0**-126, 3.4e38, 3.39e38,
        65519.0, 65520.0, 2.0**-25, 2.0**-24, 1 + 2.0**-8, 1 + 2.0**-11, 1.01171875]  # fmt: skip


def floats(count, seed=0):
    """Of every sign, exponent and mantissa, with the hard ones first."""
    bits = np.random.default_rng(seed).integers(0, 2**32, count, np.uint32)
    values = bits.view(np.float32)
    values[: len(HARD)] = HARD
    return values


@pytest.mark.parametrize("name, dtype", [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_conversions_to_half_precision_and_back(name, dtype):
    values = floats(1024)
    wanted = torch.from_numpy(values.copy()).to(dtype).float().numpy()
    there = f"cvt.rn.{name}.f32 %rs1, %r1; cvt.f32.{name} %r2, %rs1;"
    both = f"cvt.rn.{name}x2.f32 %r3, %r1, %r1; mov.b32 {{%rs1, %rs2}}, %r3; "
    for code in (there, both + f"cvt.f32.{name} %r2, %rs2;"):
        found = of_each(code, values, np.float32)
        np.testing.assert_array_equal(found, wanted)
        assert (np.signbit(found) == np.signbit(wanted))[~np.isnan(wanted)].all()


def rounded(value, dtype):
    """A fraction to the nearest float, ties to even, subnormal numbers included."""
    digits, least = {np.float32: (24, -149), np.float64: (53, -1074)}[dtype]
    if value == 0:
        return dtype(0)
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    unit = Fraction(2) ** max(exponent - digits + 1, least)
    return dtype(float(round(value / unit) * unit))  # round() takes ties to even


@pytest.mark.parametrize("dtype, letter", [(np.float32, "f32"), (np.float64, "f64")])
def test_fma_rounds_once(dtype, letter):
    """Random numbers, and products that a sum takes next to the middle between two floats."""
    source, cases = random.Random(0), []
    digits = np.finfo(dtype).nmant
    for _ in range(2000):
        x, y = (dtype(source.choice([-1, 1]) * (1 + source.getrandbits(digits) * 2.0**-digits)
                      * 2.0 ** source.randint(-30, 30)) for _ in range(2))  # fmt: skip
        z = dtype(source.uniform(-2, 2) * 2.0 ** source.randint(-60, 60))
        cases.append((x, y, z))
        # Half an ulp of one, less a trace that is lost where the sum is rounded twice.
        trace = 2.0 ** -source.randint(digits // 2 + 4, digits - 1)
        half = dtype(2.0 ** -(digits + 1) * (1 + trace))
        cases.append((half, dtype(1 - trace), dtype(1 + source.getrandbits(1) * 2.0**-digits)))
        odd = dtype(1 + 2.0**-digits)
        cases.append((odd, odd, dtype(source.choice([-1, 1]) * 2.0 ** source.randint(-9, 60))))
    x, y, z = (np.array(column, dtype) for column in zip(*cases, strict=True))
    with np.errstate(all="ignore"):
        found = ptx.fma(x, y, z)
    wanted = [rounded(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c)), dtype)
              for a, b, c in cases]  # fmt: skip
    np.testing.assert_array_equal(found, np.array(wanted, dtype))
    if dtype == np.float32:  # not what float64 makes of it, rounded twice
        assert (found != (x.astype(np.float64) * y + z).astype(np.float32)).any()


@pytest.mark.parametrize(
    "code, of",
    [
        ("mul.hi.u32 %r2, %r1, -766435501;", lambda x: (x * 0xD2511F53) >> 32),
        ("mul.lo.s32 %r2, %r1, 12345;", lambda x: x * 12345 & 0xFFFFFFFF),
        ("bfe.u32 %r2, %r1, 5, 9;", lambda x: x >> 5 & 511),
        ("bfe.s32 %r2, %r1, 28, 4;", lambda x: ((x >> 28 ^ 8) - 8) & 0xFFFFFFFF),
        ("prmt.b32 %r2, %r1, 0, 0x8012;",
         lambda x: (x >> 16 & 255) | (x & 0xFF00) | (x & 255) << 16 | 0xFF * (x >> 7 & 1) << 24),
        ("shl.b32 %r2, %r1, 33;", lambda x: 0 * x),
        ("shr.s32 %r2, %r1, 40;", lambda x: 0xFFFFFFFF * (x >> 31)),
        ("div.s32 %r2, %r1, -7;", np.vectorize(lambda x: int((x - (x >> 31 << 32)) / -7) % 2**32)),
    ],
)  # fmt: skip
def test_integers(code, of):
    values = np.random.default_rng(0).integers(0, 2**32, 512, np.uint32)
    values[:4] = [0, 1, 2**31, 2**32 - 1]
    found = of_each(code, values)
    assert (found == of(values.astype(object)).astype(np.uint32)).all()


@pytest.mark.parametrize("name", sorted(ptx.COMPARISONS))
def test_comparisons_with_nan(name):
    pairs = [(1, 2), (2, 1), (1, 1), (math.nan, 1), (1, math.nan), (math.nan, math.nan)]
    kept = {"eq": "001", "ne": "110", "lt": "100", "le": "101", "gt": "010", "ge": "011"}
    plain = {"num": "111000", "nan": "000111"}
    wanted = plain.get(name) or kept[name[:2]] + ("111" if name.endswith("u") else "000")
    given = np.array(pairs * 8, np.float32)[:32].reshape(-1)
    code = EACH8 + EACH4.replace("add.s64 %rd2, %rd0, %rd8; ", "")
    code += "ld.global.v2.b32 {%r1, %r2}, [%rd2];" + f"setp.{name}.f32 %p1, %r1, %r2;"
    found = run(code + "selp.b32 %r2, 1, 0, %p1;" + STORE, given, np.zeros(32, np.uint32))
    assert "".join(map(str, found[:6])) == wanted


# == Tensor cores ==================================================================================


def test_warps_matrices_come_back_as_they_went():
    """stmatrix, then ldmatrix, and the transposed load."""
    rows = """
    mov.b32 %r5, global_smem; and.b32 %r6, %r0, 15; shl.b32 %r6, %r6, 4; add.s32 %r5, %r5, %r6;
    stmatrix.sync.aligned.m8n8.x2.shared.b16 [%r5], {%r1, %r3};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x2{trans}.shared.b16 {%r2, %r4}, [%r5];
    """
    values = np.random.default_rng(0).integers(0, 2**32, 32, np.uint32)
    code = rows.replace("{trans}", "").replace("stmatrix", "mov.b32 %r3, %r1; stmatrix", 1)
    assert (of_each(code, values, shared=256) == values).all()
    code = rows.replace("{trans}", ".trans").replace("stmatrix", "mov.b32 %r3, %r1; stmatrix", 1)
    wanted = np.ascontiguousarray(values.view(np.uint16).reshape(8, 8).T).view(np.uint32)
    assert (of_each(code, values, shared=256) == wanted.reshape(-1)).all()


def numbers(shape, kind, seed):
    """Random numbers, and their bits as registers hold them: float32, or pairs of 16 bits."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if kind == "tf32":
        cut = values.numpy().view(np.uint32) & np.uint32(0xFFFFE000)
        return torch.from_numpy(cut.view(np.float32)), values.numpy()
    values = values.to({"bf16": torch.bfloat16, "f16": torch.float16}[kind])
    return values.float(), values.view(torch.int16).numpy()


@pytest.mark.parametrize(
    "kind, k", [("tf32", 4), ("tf32", 8), ("bf16", 8), ("bf16", 16), ("f16", 16)]
)
def test_a_warps_product(kind, k):
    """mma.sync by the layouts of the PTX manual, each lane's registers read one by one."""
    a, a_bits = numbers((16, k), kind, 1)
    b, b_bits = numbers((k, 8), kind, 2)
    per = 1 if kind == "tf32" else 2
    lane = np.arange(32)
    group, within = lane // 4, lane % 4
    columns = [within * per + j for j in range(per)]
    registers = [np.stack([a_bits[group + 8 * (i % 2), c + 4 * per * (i // 2)] for c in columns], 1)
                 for i in range(k // (2 * per))]  # fmt: skip
    registers += [np.stack([b_bits[c + 4 * per * i, group] for c in columns], 1)
                  for i in range(k // (4 * per))]  # fmt: skip
    given = np.concatenate([np.ascontiguousarray(r).view(np.uint32).reshape(-1) for r in registers])
    count = len(registers)
    names = [f"%r{10 + i}" for i in range(count)]
    loads = EACH4 + "".join(f"ld.global.b32 {n}, [%rd2+{128 * i}];\n" for i, n in enumerate(names))
    lefts = names[: k // (2 * per)]
    code = loads + "mov.b32 %r1, 0f3F800000;\n" + (
        f"mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32 {{%r2, %r3, %r4, %r5}}, "
        f"{{{', '.join(lefts)}}}, {{{', '.join(names[len(lefts):])}}}, {{%r1, %r1, %r1, %r1}};\n"
    ) + "".join(f"st.global.b32 [%rd3+{128 * i}], %r{2 + i};\n" for i in range(4))  # fmt: skip
    found = run(code, given, np.zeros(128, np.float32)).reshape(4, 32)
    product = (a.double() @ b.double() + 1).float().numpy()
    wanted = [product[group + 8 * (i // 2), 2 * within + i % 2] for i in range(4)]
    np.testing.assert_array_equal(found, np.stack(wanted))


def swizzled(tile, line):
    """Rows of `line` bytes, their pieces of 16 bytes moved by bits 7 to 9 of their address."""
    flat = np.ascontiguousarray(tile).view(np.uint8).reshape(-1)
    place = np.arange(flat.size)
    result = np.empty_like(flat)
    result[place ^ (place >> 7 & (line // 16 - 1)) << 4] = flat
    return result


@pytest.mark.parametrize("kind, line", [("tf32", 128), ("tf32", 64), ("tf32", 32), ("bf16", 128),
                                        ("bf16", 64), ("bf16", 32)])  # fmt: skip
@pytest.mark.parametrize("across", [False, True])
def test_a_warp_groups_product(kind, line, across):
    """wgmma: A in registers, B by a descriptor, along memory or across it; twice into one sum."""
    size, columns = (4, 16) if kind == "tf32" else (2, 16)
    k, per = 32 // size, 4 // size
    if across and kind == "tf32":
        pytest.skip("there is no such instruction")
    a, a_bits = numbers((64, k), kind, 1)
    b, b_bits = numbers((k, columns), kind, 2)
    if across:  # rows of k, each with the columns along it
        tile = np.zeros((k, line // size), b_bits.dtype)
        tile[:, :columns] = b_bits[:, : line // size]
    else:
        tile = np.zeros((columns, line // size), b_bits.dtype)
        tile[:, :k] = b_bits.T
    memory = swizzled(tile, line)
    thread = np.arange(128)
    row, within = thread // 32 * 16 + thread % 32 // 4, thread % 4
    registers = [
        np.stack([a_bits[row + 8 * (i % 2), within * per + j + 4 * per * (i // 2)]
                  for j in range(per)], 1)
        for i in range(4)
    ]  # fmt: skip
    given = np.concatenate(
        [np.ascontiguousarray(r).view(np.uint8).reshape(-1) for r in registers] + [memory]
    )
    stride = 8 * line
    mode = {128: 1, 64: 2, 32: 3}[line]
    descriptor = mode << 62 | (stride // 16) << 32 | 1 << 16 | (ptx.SHARED_BASE // 16)
    words = memory.size // 4
    copy = "".join(
        f"ld.global.b32 %r9, [%rd2+{2048 + 512 * i}]; st.shared.b32 [%r8+{512 * i}], %r9;\n"
        for i in range(words // 128)
    )
    sums = ", ".join(f"%r{20 + i}" for i in range(columns // 2))
    trans = "" if kind == "tf32" else f", {int(across)}"
    product = (
        f"wgmma.mma_async.sync.aligned.m64n{columns}k{k}.f32.{kind}.{kind} {{{sums}}}, "
        f"{{%r10, %r11, %r12, %r13}}, %rd4, KEEP, 1, 1{trans};\n"
    )
    code = EACH4 + "".join(f"ld.global.b32 %r{10 + i}, [%rd2+{512 * i}];\n" for i in range(4))
    code += "mov.b32 %r7, global_smem; shl.b32 %r8, %r0, 2; add.s32 %r8, %r8, %r7;\n" + copy
    code += f"bar.sync 0; mov.b64 %rd4, {descriptor}; mov.pred %p1, -1;\n"
    code += product.replace("KEEP", "0") + product.replace("KEEP", "%p1")
    end = "".join(f"st.global.b32 [%rd3+{512 * i}], %r{20 + i};\n" for i in range(columns // 2))
    wait = "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n"
    empty = np.zeros(64 * columns, np.float32)
    found = run(code + wait + end, given, empty, threads=128, shared=memory.size)
    once = (a.double() @ b.double()).float()
    wanted = (a.double() @ b.double() + once).float().numpy()
    if across and line // size < columns:
        wanted = wanted[:, : line // size]
    at = [(row + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * within + i % 2) for i in range(columns // 2)]
    np.testing.assert_array_equal(found.reshape(-1, 128), np.stack([wanted[r, c] for r, c in at]))
    with pytest.raises(Fault, match=r"%r20 was never written"):  # still in flight
        run(code + end, given, empty, threads=128, shared=memory.size)


# == Errors ========================================================================================


@pytest.mark.parametrize(
    "code, message",
    [
        ("ld.global.b32 %r2, [%rd2+128];", r"4 bytes at 0x\w+ are outside of every operand"),
        ("ld.global.b32 %r2, [%rd2+-4];", "outside of every operand"),
        ("st.global.b32 [%rd2+4096], %r1;", "outside of every operand"),
        ("ld.global.b32 %r2, [%rd2+2];", r"4 bytes at 0x\w+ are misaligned"),
        ("ld.global.v2.b32 {%r2, %r3}, [%rd2];", r"8 bytes at 0x\w+ are misaligned"),
        ("mov.b32 %r3, global_smem; ld.shared.b32 %r2, [%r3+64];", "of a program's 64 of shared"),
        ("mov.b32 %r3, 0; ld.shared.b32 %r2, [%r3];", "of a program's 64 of shared"),
        ("frobnicate.b32 %r2, %r1;", "the instruction frobnicate is not known"),
        ("add.rz.f32 %r2, %r1, %r1;", "the instruction add.rz is not known"),
        ("add.s32 %r2, %r1, %r77; st.global.b32 [%rd3], %r2;", "never written"),
        ("setp.eq.b32 %p1, %r0, 3; @%p1 mov.b32 %r2, 0;", "%r2 was never written in some lanes"),
        ("add.s64 %r2, %r1, %r1;", "has 4 bytes, not a s64's"),
    ],
)
def test_errors_name_kernel_and_instruction(code, message):
    with pytest.raises(Fault, match=rf"kernel: .*{message}"):
        of_each(code, np.arange(32, dtype=np.uint32), shared=64)


def test_what_no_lane_executes_is_no_error():
    found = of_each(
        "mov.b32 %r2, 5; setp.gt.u32 %p1, %r0, 99; @%p1 ld.global.b32 %r2, [%rd0+999];",
        np.arange(32, dtype=np.uint32),
    )
    assert (found == 5).all()


# == The kernels ===================================================================================

PLANTED = """
import numpy as np
from tests.helpers import ptx
PLANTED = lambda x, y: np.nextafter(x + y, np.float32("inf")) if x.dtype == "f4" else x + y
ptx.pure("add add.rn")(PLANTED)
from tests.helpers.ptx_device import *
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the kernels run on it")
def test_one_ulp_in_an_add_is_found(tmp_path):
    """Of the hardware's addition: the multistep kernel is no longer equal to the bit."""
    (tmp_path / "planted.py").write_text(PLANTED)
    chosen = "tests/kernels/test_multistep_step.py::test_every_table_shape[1-2]"
    done = bench.ptx.run(chosen, plugin="planted", path=[tmp_path])
    assert done.returncode == 1 and "Mismatched elements" in done.stdout, done.stdout[-2000:]


SOME = (
    "every_number_of_operands and 2-3 or dtypes and bfloat16 and float64 "
    "or every_table_shape and 4-2 or layouts and bfloat16 "
    "or the_last_pass and size1 or the_pass_between and size2 or many_samples "
    "or test_sizes and (size3 or size6) or whole_images and not adaptive and size2 "
    "or seeded_noise"
)
KERNELS = ("_add", "_combine", "_multistep_step", "_row", "_spectral_filter", "_weighted_sums",
           "_whole")  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: they run on it")
def test_the_kernels_tests_hold_on_their_machine_code(tmp_path):
    """A part of them, every kernel; `make ptx-check` runs all."""
    done = bench.ptx.run("-k", SOME, "--ptx-counts", str(tmp_path), *bench.ptx.TESTS)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "failed" not in done.stdout and re.search(r"\d+ passed", done.stdout)
    (counts,) = tmp_path.iterdir()
    assert set(json.loads(counts.read_text())) == {f"{name}_kernel" for name in KERNELS}
