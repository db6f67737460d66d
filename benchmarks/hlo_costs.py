"""What a program compiled for a GPU costs, read from its text: kernels launched, and bytes moved.

Every instruction of a schedule that computes is a launch. A loop costs what is in its body and its condition
for each trip, and one more launch for each test, whose result the host reads. An operand counts with all its
bytes, unless a fusion reads it by gathers alone: then with what these yield. A result counts with its bytes,
unless it is an operand that a fusion updates in place by a scatter or a slice: then with the update's.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

FREE = frozenset(
    {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "while", "partition-id"}
)
BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "f8e4m3fn": 8, "f8e5m2": 8}
ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")


@dataclass
class Instruction:
    """One line of a computation."""

    name: str
    shape: str
    opcode: str
    operands: list[str]
    text: str


@dataclass
class Costs:
    """Launches of kernels, and bytes that they read and write."""

    launches: int = 0
    bytes: int = 0

    def add(self, other: "Costs", times: int = 1) -> None:
        self.launches += times * other.launches
        self.bytes += times * other.bytes


@dataclass
class Program:
    """The computations of a compiled program."""

    computations: dict[str, list[Instruction]] = field(default_factory=dict)
    entry: str = ""

    @classmethod
    def parse(cls, text: str) -> "Program":
        """Read what ``compiled.as_text()`` returns."""
        program, current = cls(), None
        for line in text.splitlines():
            begin = re.match(r"^(ENTRY )?%([\w.-]+) \(.*\{$", line)
            if begin:
                current = program.computations[begin.group(2)] = []
                if begin.group(1):
                    program.entry = begin.group(2)
            elif current is not None and (match := INSTRUCTION.match(line)):
                name, shape, opcode, rest = match.groups()
                operands = re.findall(r"%([\w.-]+)", rest.split(")")[0])
                current.append(Instruction(name, shape, opcode, operands, line))
        return program

    def costs(self, trips: int) -> Costs:
        """Return the costs of one run, in which each loop of unknown length makes so many trips."""
        return self._costs_of(self.entry, trips)

    def _costs_of(self, computation: str, trips: int) -> Costs:
        costs = Costs()
        by_name = {one.name: one for one in self.computations[computation]}
        for one in self.computations[computation]:
            if one.opcode == "while":
                known = re.search(r'"known_trip_count":\{"n":"(\d+)"', one.text)
                times = int(known.group(1)) if known else trips
                for part in ("body", "condition"):
                    costs.add(self._costs_of(_attribute(one, part), trips), times)
                costs.launches += times
            elif one.opcode not in FREE:
                costs.launches += 1
                costs.bytes += self._bytes_of(one, by_name)
        return costs

    def _bytes_of(self, one: Instruction, by_name: dict[str, Instruction]) -> int:
        operands = [size_of(by_name[name].shape) for name in one.operands if name in by_name]
        result = size_of(one.shape)
        if "calls=" not in one.text:
            return sum(operands) + result
        called = self.computations[_attribute(one, "calls")]
        for number, parameter in enumerate(_parameters(called)):
            if number >= len(operands):
                break
            users = list(_users_of(parameter, called))
            gathers = [size_of(user.shape) for user in users if user.opcode in ("gather", "dynamic-slice")]
            if gathers and len(gathers) == len(users):
                operands[number] = min(operands[number], sum(gathers))
            updates = [user for user in users if user.opcode in ("scatter", "dynamic-update-slice")]
            if updates and len(updates) == len(users):
                result -= operands[number]
                operands[number] = 0
        return sum(operands) + max(result, 0)


def size_of(shape: str) -> int:
    """Return the bytes of an array, or of a tuple of arrays, as the text has them."""
    total = 0
    for dtype, lengths in ARRAY.findall(shape):
        bits = BITS.get(dtype) or int(re.sub(r"\D", "", dtype) or 8)
        total += math.prod(int(length) for length in lengths.split(",") if length) * bits // 8
    return total


def _attribute(one: Instruction, name: str) -> str:
    match = re.search(rf"\b{name}=%([\w.-]+)", one.text)
    assert match is not None
    return match.group(1)


def _parameters(called: Sequence[Instruction]) -> list[Instruction]:
    parameters = [one for one in called if one.opcode == "parameter"]
    return sorted(parameters, key=lambda one: int(re.search(r"parameter\((\d+)\)", one.text).group(1)))


def _users_of(source: Instruction, called: Sequence[Instruction]) -> Iterator[Instruction]:
    """Yield what reads an instruction, through bitcasts and the like."""
    for one in called:
        if source.name in one.operands:
            if one.opcode in ("bitcast", "reshape"):
                yield from _users_of(one, called)
            elif one.operands[0] == source.name:
                yield one
            else:  # as an index, say
                yield Instruction("", "", "", [], "")
