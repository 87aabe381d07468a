"""PTX text as numbers for the emulator: instructions, registers of four kinds, constants in registers.

The text is what Triton's compiler emits: one kernel, virtual registers, inline assembly in scopes of its own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

# kinds of operands, as in machine.h; those of registers are also the classes in which they are numbered
LITERAL, PREDICATE, HALF, WORD, DOUBLE = range(5)
KIND_OF_TYPE = {"pred": PREDICATE, "f32x2": DOUBLE} | {
    f"{letter}{bits}": kind for letter in "busf" for bits, kind in ((8, HALF), (16, HALF), (32, WORD), (64, DOUBLE))
}
KIND_OF_TYPE |= {"bf16": HALF, "f16x2": WORD, "bf16x2": WORD, "tf32": WORD}
BITS = {PREDICATE: 1, HALF: 16, WORD: 32, DOUBLE: 64}
# instructions whose plain numbers are not values in registers
TAKES_LITERALS = ("bar", "barrier", "cp", "elect", "fence", "mbarrier", "stmatrix", "tcgen05", "wgmma")
NAME = r"[%$\w]+"
NUMBER = re.compile(r"-?(0[xX][0-9a-fA-F]+|\d+)U?$")


@dataclass
class Program:
    """A kernel.

    Attributes:
        name: of the kernel.
        operations: of every instruction, as written: "add.s32".
        words: for every instruction its guard (a predicate or -1), whether it is negated, the number of operands and
            (kind, value) of each.
        registers: how many there are of each kind, constants and special registers among them.
        constants: (kind, register, value).
        special: (name such as "%tid.x", register), all of 32 bits.
        parameters: (type, name) in order.
        lines: of every instruction, as written.
    """

    name: str
    operations: list[str] = field(default_factory=list)
    words: list[int] = field(default_factory=list)
    registers: list[int] = field(default_factory=lambda: [0] * 5)
    constants: list[tuple[int, int, int]] = field(default_factory=list)
    special: list[tuple[str, int]] = field(default_factory=list)
    parameters: list[tuple[str, str]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def parse(text: str) -> Program:
    """The one kernel in ``text``.

    Raises:
        ValueError: a statement that is not understood, with its text.
    """
    return _Parser(text).program


class _Parser:
    def __init__(self, text: str) -> None:
        text = re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.S)
        text = re.sub(r"^\s*\.(loc|pragma)\b[^\n]*$", "", text, flags=re.M)
        entry = re.search(rf"\.entry\s+({NAME})\s*\((.*?)\)[^{{]*\{{", text, re.S)
        if entry is None:
            raise ValueError("expected PTX with an .entry")
        self.program = Program(entry[1])
        self.program.parameters = re.findall(rf"\.param\s+\.(\w+)[^,]*?({NAME})\s*(?:,|$)", entry[2])
        self._kinds: dict[str, int] = {}  # of declared prefixes and names
        self._numbers: dict[tuple[int, str], int] = {}
        self._labels: dict[str, int] = {}
        self._jumps: list[tuple[int, str]] = []  # (word to fill in, label)
        self._scopes = 0
        body = text[entry.end() :]
        self._block(body[: _closing(body)], {})
        self._line = "ret"
        self._emit("ret", [], None)
        for word, label in self._jumps:
            if label not in self._labels:
                raise ValueError(f"a branch to {label}, which is nowhere")
            self.program.words[word] = self._labels[label]

    def _block(self, text: str, names: dict[str, str]) -> None:
        """A scope: its statements, with its own names made unique."""
        at, begun = 0, 0
        while at < len(text):
            letter, before = text[at], text[begun:at]
            if letter == ";":
                self._statement(" ".join(before.split()), names)
            elif letter == ":" and re.fullmatch(rf"\s*{NAME}\s*", before) and text[at : at + 2] != "::":
                label = before.strip()
                self._labels[names.get(label, label)] = len(self.program.operations)
            elif letter == "{" and not before.strip():
                inner = text[at + 1 :]
                inner = inner[: _closing(inner)]
                self._scopes += 1
                own = [x.strip() for found in re.findall(r"\.reg\s+\.\w+\s+([^;]+);", inner) for x in found.split(",")]
                own += re.findall(rf"^\s*({NAME}):(?!:)", inner, re.M)
                self._block(inner, names | {name: f"{name}@{self._scopes}" for name in own})
                at += len(inner) + 1
            else:
                at += 1
                continue
            at += 1
            begun = at

    def _statement(self, text: str, names: dict[str, str]) -> None:
        declared = re.match(r"\.reg \.(\w+) (.*)", text)
        if declared:
            for name in declared[2].split(","):
                plain = re.sub(r"<\d+>", "", name.strip())
                self._kinds[names.get(plain, plain)] = KIND_OF_TYPE[declared[1]]
            return
        if not text or text.startswith("."):
            return
        self._line, guard = text, None
        found = re.match(rf"@(!?)({NAME}) (.*)", text)
        if found:
            guard, text = (self._register(found[2], names, PREDICATE), found[1] == "!"), found[3]
        operation, _, rest = text.partition(" ")
        try:
            self._instruction(operation, _split(rest), guard, names)
        except (KeyError, ValueError, IndexError) as error:
            raise ValueError(f"not understood: {text!r}: {error}") from error

    def _instruction(self, operation: str, parts: list[str], guard: object, names: dict[str, str]) -> None:
        base = operation.split(".")[0]
        if base == "bra":
            word = self._emit(operation, [(LITERAL, 0)], guard)
            self._jumps.append((word, names.get(parts[0], parts[0])))
            return
        if operation.startswith("ld.param"):
            name, _, offset = parts[1][1:-1].partition("+")
            where = [x for _, x in self.program.parameters].index(name.strip()) * 8 + int(offset or 0)
            self._emit(operation, [self._operand(parts[0], operation, 0, names), (LITERAL, where)], guard)
            return
        operands: list[tuple[int, int]] = []
        for position, part in enumerate(parts):
            if part.startswith("{"):
                inside = _split(part[1:-1])
                kind = next(self._operand(x, operation, position, names)[0] for x in inside if x != "_")
                for x in inside:
                    operands.append(
                        (kind, self._number(kind, "_")) if x == "_" else self._operand(x, operation, position, names)
                    )
            elif part.startswith("["):
                base_name, _, offset = part[1:-1].partition("+")
                operands.append(self._operand(base_name.strip(), operation, position, names, address=True))
                operands.append((LITERAL, int(offset.strip() or "0", 0)))
            elif "|" in part:
                operands += [self._operand(x.strip(), operation, position, names) for x in part.split("|")]
            else:
                operands.append(self._operand(part, operation, position, names))
        self._emit(operation, operands, guard)

    def _operand(
        self, text: str, operation: str, position: int, names: dict[str, str], address: bool = False
    ) -> tuple[int, int]:
        if text == "global_smem":
            return self._constant(WORD, 0)
        if text.startswith(("0f", "0F", "0d", "0D")):
            return self._constant(WORD if text[1] in "fF" else DOUBLE, int(text[2:], 16))
        if NUMBER.match(text):
            value = int(text.rstrip("U"), 0)
            if operation.split(".")[0] in TAKES_LITERALS and not address:
                return LITERAL, value
            return self._constant(WORD if address else _kind_of_number(operation, position), value)
        return self._register(text, names)

    def _register(self, text: str, names: dict[str, str], kind: int | None = None) -> tuple[int, int]:
        name = names.get(text, text)
        if re.match(r"%(tid|ctaid|ntid|nctaid|laneid|warpid)\b", name):
            known = dict(self.program.special)
            if name not in known:
                self.program.special.append((name, self._number(WORD, name)))
            return WORD, dict(self.program.special)[name]
        found = self._kinds.get(name, self._kinds.get(re.sub(r"\d+$", "", name)))
        if found is None or (kind is not None and found != kind):
            raise ValueError(f"an operand that is not declared: {text}")
        return found, self._number(found, name)

    def _number(self, kind: int, name: str) -> int:
        key = (kind, name)
        if key not in self._numbers:
            self._numbers[key] = self.program.registers[kind]
            self.program.registers[kind] += 1
        return self._numbers[key]

    def _constant(self, kind: int, value: int) -> tuple[int, int]:
        value &= (1 << BITS[kind]) - 1
        key = f"#{value}"
        if (kind, key) not in self._numbers:
            self.program.constants.append((kind, self._number(kind, key), value))
        return kind, self._number(kind, key)

    def _emit(self, operation: str, operands: list[tuple[int, int]], guard: object) -> int:
        """Appends an instruction; the index of its first operand's value."""
        (_, predicate), negated = guard if guard is not None else ((0, -1), False)  # type: ignore[misc]
        self.program.operations.append(operation)
        self.program.lines.append(self._line)
        self.program.words += [predicate, int(negated), len(operands)]
        first = len(self.program.words) + 1
        for operand in operands:
            self.program.words += operand
        return first


def _kind_of_number(operation: str, position: int) -> int:
    """The kind of the register that stands for a number."""
    parts = operation.split(".")
    if parts[0] in ("shl", "shr") and position == 2:
        return WORD
    if parts[0] in ("bfe", "bfi", "shf") and position >= len(parts[0]) - 1 + (parts[0] == "bfi"):
        return WORD
    if parts[0] == "vote" and position == 2:
        return WORD
    if parts[:2] == ["mad", "wide"] and position == 3:
        return WORD if parts[2].endswith("16") else DOUBLE
    return KIND_OF_TYPE[[part for part in parts if part in KIND_OF_TYPE][-1]]


def _closing(text: str) -> int:
    """Where the brace that was opened before ``text`` is closed."""
    depth = 1
    for found in re.finditer(r"[{}]", text):
        depth += 1 if found[0] == "{" else -1
        if depth == 0:
            return found.start()
    raise ValueError("a scope that is not closed")


def _split(text: str) -> list[str]:
    """Operands: at commas outside of braces and brackets."""
    parts = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text)
    return [part.strip() for part in parts if part.strip()]
