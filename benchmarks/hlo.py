"""What a compiled program's text says of itself: cycles, loops multiplied out, and collectives.

The TPU's compiler writes its own estimate, ``estimated_cycles``, beside most instructions. Those of
a loop's body count as often as the loop runs: its trip count is the constant that its condition
compares with, for this compiler writes no other. Instructions without an estimate count nothing.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64}
_HEADER = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|[\s)}\]])([a-z][a-z0-9\-]*)\(")
_ROLES = "condition|body|to_apply|calls|branch_computations"
_CALLED = re.compile(rf"\b({_ROLES})=\{{?(%[\w.\-]+(?:, ?%[\w.\-]+)*)")
_SHAPE = re.compile(r"\b(pred|bf16|f16|f32|f64|[su]\d+|f8\w*)\[([\d,]*)\]")


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
        name: its own.
        opcode: such as ``fusion``.
        shape: of its result, as written.
        cycles: what the compiler estimates for running it once.
        called: the computations that it runs, by what they are to it.
        operation: the operation of the traced function that it comes from.
        frame: number of the source line's frame; 0: unknown.
        text: the line, for what else one wants to know.
    """

    name: str
    opcode: str
    shape: str
    cycles: int
    called: dict[str, tuple[str, ...]]
    operation: str
    frame: int
    text: str


class Program(NamedTuple):
    """A compiled program.

    Attributes:
        computations: instructions by the computation's name.
        entry: the name of the one that is called.
        lines: number of a frame -> file:line.
    """

    computations: dict[str, list[Instruction]]
    entry: str
    lines: dict[int, str]


def parse(text: str) -> Program:
    """The program of an optimised HLO text.

    Raises:
        ValueError: if it has no entry.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current.append(_instruction(found[1], found[2]))
    if not entry:
        raise ValueError("this is no program: it has no ENTRY")
    return Program(computations, entry, _source_lines(text))


def _instruction(name: str, rest: str) -> Instruction:
    rest_without_notes = re.sub(r'"(?:[^"\\]|\\.)*"', '""', rest)
    opcode = _OPCODE.search(rest_without_notes)
    shape = rest_without_notes[: opcode.start(1)] if opcode else rest_without_notes
    cycles = re.search(r'"estimated_cycles":"(\d+)"', rest)
    operation = re.search(r'op_name="([^"]*)"', rest)
    frame = re.search(r"stack_frame_id=(\d+)", rest)
    called = {
        role: tuple(n.strip(" %") for n in names.split(","))
        for role, names in _CALLED.findall(rest_without_notes)
    }
    return Instruction(
        name,
        opcode[1] if opcode else "",
        shape.strip(),
        int(cycles[1]) if cycles else 0,
        called,
        operation[1] if operation else "",
        int(frame[1]) if frame else 0,
        rest,
    )


def _source_lines(text: str) -> dict[int, str]:
    files = dict(re.findall(r'^(\d+) "([^"]*)"$', _section(text, "FileNames"), re.MULTILINE))
    place = r"^(\d+) \{file_name_id=(\d+) .*?\bline=(\d+)"
    places = re.findall(place, _section(text, "FileLocations"), re.MULTILINE)
    location = {number: f"{files.get(file, '')}:{line}" for number, file, line in places}
    frames = re.findall(
        r"^(\d+) \{file_location_id=(\d+)", _section(text, "StackFrames"), re.MULTILINE
    )
    return {int(number): location.get(place, "") for number, place in frames}


def _section(text: str, title: str) -> str:
    found = re.search(rf"^{title}\n(.*?)\n\n", text, re.MULTILINE | re.DOTALL)
    return found[1] if found else ""


def trip_count(program: Program, loop: Instruction) -> int | None:
    """How often a ``while`` runs its body, counted from 0 by 1; None if nothing says it."""
    (condition,) = loop.called["condition"]
    constants = {
        i.name: int(value[1])
        for i in program.computations[condition]
        if (value := re.search(r"\bconstant\((-?\d+)\)", i.text))
    }
    for instruction in program.computations[condition]:
        if instruction.opcode == "compare" and "direction=LT" in instruction.text:
            operands = re.findall(r"%([\w.\-]+)", instruction.text)
            if bounds := [constants[name] for name in operands if name in constants]:
                return bounds[-1]
    # The comparison may have been fused; a condition with one constant leaves no doubt.
    return next(iter(constants.values())) if len(constants) == 1 else None


def executed(program: Program, name: str = "", times: int = 1) -> Iterator[tuple[Instruction, int]]:
    """Every instruction with how often it runs, a fusion as one; of branches the dearest runs.

    Loops whose trip count is unknown count once.
    """
    for instruction in program.computations[name or program.entry]:
        called = instruction.called
        if instruction.opcode == "while":
            count = trip_count(program, instruction)
            yield from executed(program, called["body"][0], times * (1 if count is None else count))
        elif instruction.opcode == "conditional":
            branches = called.get("branch_computations", ())
            dearest = max(branches, key=lambda b: cycles(program, b), default=None)
            if dearest:
                yield from executed(program, dearest, times)
        elif instruction.opcode == "call":
            yield from executed(program, called["to_apply"][0], times)
        else:
            yield instruction, times


def cycles(program: Program, name: str = "") -> int:
    """The estimate for the whole program, or for one of its computations."""
    return sum(i.cycles * times for i, times in executed(program, name))


def unknown_loops(program: Program) -> int:
    """How many loops count once for want of a trip count."""
    return sum(
        i.opcode == "while" and trip_count(program, i) is None
        for instructions in program.computations.values()
        for i in instructions
    )


def dearest(program: Program, count: int = 10) -> list[tuple[Instruction, int, int]]:
    """Those that take most: (instruction, how often it runs, all its cycles)."""
    found = [(i, times, i.cycles * times) for i, times in executed(program) if i.cycles]
    return sorted(found, key=lambda row: -row[2])[:count]


def collectives(program: Program) -> dict[str, tuple[int, int]]:
    """By kind: how many run, and the bytes of their results on one chip."""
    found: dict[str, tuple[int, int]] = {}
    for instruction, times in executed(program):
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            number, size = found.get(kind, (0, 0))
            found[kind] = number + times, size + times * bytes_of(instruction.shape)
    return found


def bytes_of(shape: str) -> int:
    """Bytes of the arrays in a shape as the compiler writes it."""
    total = 0
    for kind, sizes in _SHAPE.findall(shape):
        bits = _BITS.get(kind) or int(re.sub(r"\D", "", kind[1:3]) or 8)
        total += math.prod(map(int, filter(None, sizes.split(",")))) * bits // 8
    return total
