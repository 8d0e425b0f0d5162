"""PTX executed on the CPU: what Triton compiled for a GPU runs on memory of this machine.

`Program(text).run(grid, parameters, memory)` takes all threads of all programs through the code at
once: a register is a NumPy array with an element for each of them, its lanes. A register in which
all lanes agree is one element long. Lanes part at branches: those at the earliest block of the code
run next, so they meet again where the code joins. Errors (`Fault`) are: an access out of bounds or
misaligned, an instruction that is not known, a barrier or a warp's instruction that not all its
lanes reach, and a register's value that was never written, where it comes to matter: in an address,
a store, a branch or a product of matrices. (Compiled code does compute with such values, in lanes
whose results nobody uses.)

**A new instruction** is one function in one of the two tables: `@pure("add.rn", "T,T->T")` above
what computes values, `@machine("bar.sync")` above what touches memory, other lanes or the order.
The name is the instruction's without the types at its end.

Numbers are the hardware's: round to nearest even, one rounding for fma, bfloat16 and float16
conversions to the bit, tensor cores' tf32 operands cut to 10 mantissa bits. What hardware leaves
open is rounded correctly here: division `.full` (within 2 ulp there), `sqrt.approx` (relative
2^-23), and sums inside a tensor core's product, whose order and width are not documented.

What this does not show: races. All lanes of a block of code take each instruction together, so a
missing barrier between warps changes nothing here; nor does a missing fence.
"""

from tests.helpers.ptx import arithmetic, memory, tensor_cores  # noqa: F401 - they fill the tables
from tests.helpers.ptx.arithmetic import COMPARISONS, fma, two_product, two_sum
from tests.helpers.ptx.operands import SPECIAL, address_reader, bits_reader, reader, vector
from tests.helpers.ptx.program import LANES, Block, Code, Program, decode, parse
from tests.helpers.ptx.run import SHARED_BASE, WARP, WARP_GROUP, Memory, Run, Span
from tests.helpers.ptx.tables import INSTRUCTIONS, Instruction, carrying, machine, pure
from tests.helpers.ptx.types import TYPES, Fault, Type, from_bfloat16, to_bfloat16, to_float16

__all__ = [
    "COMPARISONS", "INSTRUCTIONS", "LANES", "SHARED_BASE", "SPECIAL", "TYPES", "WARP",
    "WARP_GROUP", "Block", "Code", "Fault", "Instruction", "Memory", "Program", "Run", "Span",
    "Type", "address_reader", "bits_reader", "carrying", "decode", "fma", "from_bfloat16",
    "machine", "parse", "pure", "reader", "to_bfloat16", "to_float16", "two_product", "two_sum",
    "vector",
]  # fmt: skip
