"""Executes the PTX that nvcc makes of a kernel, on numpy, inside this process' memory.

One block at a time, one instruction for all its threads at a time: threads at the lowest program counter go first, so
that diverged threads meet again. Registers are arrays of bits, one entry per thread. Only what the kernels use is known;
anything else raises NotImplementedError by name.
"""

from __future__ import annotations

import ctypes
import re

import numpy as np

TYPES = {
    **{f"{k}{n}": np.dtype(f"{c}{n // 8}") for k, c in (("u", "u"), ("s", "i"), ("b", "u")) for n in (8, 16, 32, 64)},
    "f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8"), "pred": np.dtype("?"),
}  # fmt: skip
# All of this process' memory, by address. Pages are touched only where a kernel reads or writes.
MEMORY_AT = 4096
MEMORY = np.ctypeslib.as_array((ctypes.c_uint8 * (2**47 - 2 * MEMORY_AT)).from_address(MEMORY_AT))

COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


# What `parked` holds for a thread that waits for an mbarrier rather than a barrier.
AT_MBARRIER = 100
# emu/sm90.h's TensorMap, which the emulator's launch code fills.
TENSOR_MAP = np.dtype([("magic", "u8"), ("base", "u8"), ("rank", "u4"), ("element", "u4"), ("dims", "u8", 3), ("strides", "u8", 2), ("box", "u4", 3), ("swizzle", "u4")])
SWIZZLE = (0, 0x10, 0x30, 0x70)


class Function:
    def __init__(self, name, params):
        self.name, self.params = name, params
        self.registers: dict[str, np.dtype] = {}
        self.code: list[tuple] = []  # (predicate, opcode parts, operands)
        self.labels: dict[str, int] = {}


def parse(text: str) -> dict[str, Function]:
    """The functions of a PTX module with a body, by name."""
    text = re.sub(r"//[^\n]*", "", text)
    functions = {}
    pattern = r"\.(?:entry|func)\s*(?:\([^)]*\))?\s*(\w+)\s*\(([^)]*)\)((?:\s*\.\w+[^\n;{]*)*)\s*(;|\{)"
    for m in re.finditer(pattern, text):
        if m[4] == ";":
            continue
        params = re.findall(r"\.param\s+(?:\.align\s+\d+\s+)?\.\w+\s+(\w+)", m[2])
        f = functions[m[1]] = Function(m[1], params)
        depth, i = 1, m.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            i += 1
        _body(f, text[m.end() : i - 1])
    return functions


def _body(f: Function, text: str) -> None:
    # Braces of vectors stay, those of scopes go.
    text = re.sub(r"\{(?=\s*(\.reg|//|$|\n))|(?<=;)\s*\}|(?<=\n)\s*\}", " ", text)
    for statement in text.replace("\n", " ").split(";"):
        statement = statement.strip()
        while m := re.match(r"(\$?\w+):\s*", statement):
            f.labels[m[1]] = len(f.code)
            statement = statement[m.end() :]
        if not statement or statement in "{}":
            continue
        if m := re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement):
            for name in m[2].split(","):
                f.registers[re.sub(r"<\d+>", "", name.strip())] = TYPES[m[1]]
            continue
        if statement.startswith((".param", ".loc", ".pragma", ".file")):
            continue
        m = re.match(r"(?:@(!?)(%\w+)\s+)?([\w.:]+)\s*(.*)", statement, re.S)
        operands = [x.strip() for x in re.findall(r"\s*(\([^)]*\)|\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*)", m[4])]
        f.code.append(((m[2], m[1] == "!") if m[2] else None, m[3].split("."), [x for x in operands if x]))
    f.code.append((None, ["ret"], []))


class Block:
    """One thread block of a launch."""

    def __init__(self, functions, entry, arguments: bytes, threads: int, shared: int, block: int, blocks: int):
        self.functions, self.n = functions, threads
        self.shared = np.full(shared + 16, 0xFF, np.uint8)
        self.special = {
            "%tid.x": np.arange(threads, dtype=np.uint32), "%ctaid.x": np.full(threads, block, np.uint32),
            "%ntid.x": np.full(threads, threads, np.uint32), "%nctaid.x": np.full(threads, blocks, np.uint32),
        }  # fmt: skip
        self.warp = np.arange(threads) // 32
        self.arrived = np.zeros(16, np.int64)
        self.copies: list[list] = [[[]] for _ in range(threads // 32)]  # of each warp: groups, the last one open
        self.mbarriers: dict[int, list] = {}  # address: count, pending, bytes, phase
        self.flying: list[tuple] = []  # bulk copies: addresses, bytes, mbarrier
        self.parked = np.full(threads, -1)
        self.executed = 0
        f = functions[entry]
        # Aligned as a tensor map among them needs it.
        room = np.zeros(len(arguments) + 128, np.uint8)
        room = room[-room.ctypes.data % 128 :][: len(arguments)]
        room[:] = np.frombuffer(arguments, np.uint8)
        self.run(Frame(f, threads, {f.params[0]: room}), np.ones(threads, bool))

    def run(self, frame, threads):
        f, n = frame.f, self.n
        pc = np.where(threads, 0, -1)
        parked = self.parked = np.full(n, -1)
        frame.votes = np.zeros(n, bool)
        while True:
            live = (pc >= 0) & (parked < 0)
            if not live.any():
                if (parked >= 0).any():
                    if self.flying:
                        self.land(*self.flying.pop())
                        continue
                    raise RuntimeError(f"{f.name}: deadlock at barriers {sorted(set(parked[parked >= 0]))}")
                return
            now = pc[live].min()
            mask = live & (pc == now)
            others = pc[live & ~mask]
            limit = others.min() if others.size else len(f.code)
            everyone = mask.all()
            # Straight on until somebody else's turn or a change of direction.
            while True:
                predicate, op, args = f.code[now]
                self.executed += 1
                m = mask
                if predicate:
                    p = frame.read(predicate[0], "pred", self) ^ predicate[1]
                    m = mask & p
                if op[0] == "bra":
                    target = f.labels[args[0]]
                    pc[mask] = now + 1
                    pc[m] = target
                    break
                if op[0] in ("ret", "exit"):
                    pc[mask] = now + 1
                    pc[m] = -1
                    break
                if op[0] == "bar" and op[1] != "warp":
                    pc[mask] = now + 1
                    self.barrier(frame, op, args, mask, parked, f)
                    break
                if op[:2] == ["mbarrier", "try_wait"]:
                    # Never says no: a thread comes back to it when a phase is complete.
                    assert op[2] == "parity"
                    at, parity = self.address(frame, args[1]), frame.read(args[2], "u32", self)
                    done = np.array([not m[t] or self.mbarriers[at[t]][3] & 1 != parity[t] for t in range(n)])
                    frame.mask, frame.everyone = m & done, False
                    frame.write(args[0], np.ones(n, bool), "pred")
                    pc[mask & done], pc[mask & ~done] = now + 1, now
                    parked[mask & ~done] = AT_MBARRIER
                    break
                if m.any():
                    frame.mask, frame.everyone = m, everyone and (m is mask or m.all())
                    getattr(self, "op_" + op[0])(frame, op, args)
                now += 1
                if now >= limit:
                    pc[mask] = now
                    break

    # ---- barriers ------------------------------------------------------------------------------------------------------

    def barrier(self, frame, op, args, mask, parked, f):
        red = op[1] == "red"
        rest = args[1:] if red else args
        which = int(frame.read(rest[0], "u32", self)[mask][0])
        count = int(frame.read(rest[1], "u32", self)[mask][0]) if len(rest) > (2 if red else 1) else self.n
        self.arrived[which] += mask.sum()
        if op[1] in ("sync", "red"):
            parked[mask] = which
        if red:
            frame.votes[mask] = frame.read(args[-1], "pred", self)[mask]
            frame.red = (op[2], args[0])
        if self.arrived[which] == count:
            self.arrived[which] = 0
            free = parked == which
            parked[free] = -1
            if red:
                value = (np.all if frame.red[0] == "and" else np.any)(frame.votes[free])
                frame.mask, frame.everyone = free, False
                frame.write(frame.red[1], np.full(self.n, value), "pred")
        elif self.arrived[which] > count:
            raise RuntimeError(f"{f.name}: too many threads at barrier {which}")

    # ---- mbarriers and bulk copies --------------------------------------------------------------------------------------

    def op_mbarrier(self, frame, op, args):
        at = self.address(frame, args[0] if args[0].startswith("[") else args[1])[frame.mask]
        amount = frame.read(args[-1], "u32", self)[frame.mask].astype(np.int64) if not args[-1].startswith("[") else np.zeros(len(at), np.int64)
        for a, x in zip(at, amount):
            assert a % 8 == 0 and 0 <= a <= len(self.shared) - 24
            if op[1] == "init":
                self.mbarriers[a] = [x, x, 0, 0]
            elif op[1] == "inval":
                del self.mbarriers[a]
            elif op[1] == "arrive":
                b = self.mbarriers[a]
                assert b[1] > 0 and (op[2] == "expect_tx") == (x > 0), "mbarrier.arrive"
                b[1], b[2] = b[1] - 1, b[2] + x
                self.finish_phase(b)
            else:
                raise NotImplementedError(".".join(op))

    def finish_phase(self, b):
        if b[1] == 0 and b[2] == 0:
            b[1], b[3] = b[0], b[3] + 1
            self.parked[self.parked == AT_MBARRIER] = -1

    def land(self, at, data, mbarrier):
        self.shared[at] = data
        b = self.mbarriers[mbarrier]
        b[2] -= len(data)
        self.finish_phase(b)

    def op_fence(self, frame, op, args):
        assert op[1:3] in (["proxy", "async"], ["mbarrier_init", "release"]), op

    def op_prefetch(self, frame, op, args):
        assert op[1] == "tensormap"
        self.tensor_map(frame, args[0])

    def tensor_map(self, frame, operand):
        base = self.address(frame, operand)[frame.mask]
        assert (base == base[0]).all() and base[0] % 64 == 0
        at = int(base[0]) - MEMORY_AT
        m = MEMORY[at : at + TENSOR_MAP.itemsize].copy().view(TENSOR_MAP)[0]
        assert m["magic"] == 0x70616D726F736E74, "not a tensor map"
        return m

    def box(self, frame, rank, operand, shared):
        """Byte by byte of a box: shared addresses, global addresses (0: outside)."""
        name, coordinates = re.match(r"\[\s*(%\w+)\s*,\s*\{([^}]*)\}", operand).groups()
        m = self.tensor_map(frame, f"[{name}]")
        first = [int(frame.read(x.strip(), "s32", self)[frame.mask][0]) for x in coordinates.split(",")]
        assert len(first) == rank == m["rank"] and shared % (128 << int(m["swizzle"])) == 0
        element = int(m["element"])
        counts = [int(m["box"][i]) for i in range(rank)][::-1]
        index = np.indices(counts).reshape(rank, -1)[::-1] + np.array(first)[:, None]  # innermost first
        inside = np.all((index >= 0) & (index < m["dims"][:rank].astype(np.int64)[:, None]), 0)
        at = int(m["base"]) + index[0] * element + sum(index[i] * int(m["strides"][i - 1]) for i in range(1, rank))
        outer = (np.where(inside, at, 0)[:, None] + np.where(inside[:, None], np.arange(element), 0)).ravel()
        inner = shared + np.arange(len(outer))
        return inner ^ (inner >> 3 & SWIZZLE[m["swizzle"]]), outer

    def bulk(self, frame, op, args):
        assert frame.mask.sum() == 1, "one thread copies in bulk"
        if op[3:] == ["tensor", op[4], "global", "shared::cta", "bulk_group"]:
            inner, outer = self.box(frame, int(op[4][0]), args[0], int(self.address(frame, args[1])[frame.mask][0]))
            MEMORY[outer[outer > 0] - MEMORY_AT] = self.shared[inner[outer > 0]]
            return
        assert op[-1] == "mbarrier::complete_tx::bytes" and op[-3:-1] == ["shared::cluster", "global"], op
        to, mbarrier = int(self.address(frame, args[0])[frame.mask][0]), int(self.address(frame, args[-1])[frame.mask][0])
        if op[3] == "tensor":
            inner, outer = self.box(frame, int(op[4][0]), args[1], to)
        else:
            size = int(frame.read(args[2], "u32", self)[frame.mask][0])
            inner, outer = to + np.arange(size), self.address(frame, args[1])[frame.mask] + np.arange(size)
            assert size % 16 == 0 and to % 16 == 0 and outer[0] % 16 == 0
        data = np.where(outer > 0, MEMORY[np.where(outer > 0, outer, outer.max()) - MEMORY_AT], 0)
        assert inner.max() < len(self.shared) - 16
        self.shared[inner] = 0xFF
        self.flying.append((inner, data.astype(np.uint8), mbarrier))

    # ---- memory --------------------------------------------------------------------------------------------------------

    def address(self, frame, operand):
        m = re.match(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        base = frame.read(m[1], "u64", self) if m[1].startswith("%") else np.zeros(self.n, np.uint64)
        return base.astype(np.int64) + int(m[2] or 0)

    def load(self, space, at, nbytes):
        bytes_at = at[:, None] + np.arange(nbytes)
        if space == "shared":
            assert at.min() >= 0 and at.max() + nbytes <= len(self.shared) - 16, "shared address out of range"
            return self.shared[bytes_at]
        return MEMORY[bytes_at - MEMORY_AT]

    def store(self, space, at, data):
        bytes_at = at[:, None] + np.arange(data.shape[1])
        if space == "shared":
            assert at.min() >= 0 and at.max() + data.shape[1] <= len(self.shared) - 16, "shared address out of range"
            self.shared[bytes_at] = data
        else:
            MEMORY[bytes_at - MEMORY_AT] = data

    def op_ld(self, frame, op, args):
        space, kind = op[1], op[-1]
        if space == "volatile":
            space = op[2]
        t = TYPES[kind]
        names = args[0].strip("{}").split(",") if args[0].startswith("{") else [args[0]]
        if space == "param" and args[1].lstrip("[ ").startswith("%"):
            # A register holds an offset into the kernel's arguments: the address of their symbol reads as 0.
            source = frame.params[frame.f.params[0]]
            at = np.where(frame.mask, self.address(frame, args[1]), 0)
            for i, name in enumerate(names):
                data = np.ascontiguousarray(source[at[:, None] + np.arange(i * t.itemsize, (i + 1) * t.itemsize)])
                frame.write(name.strip(), data.view(t)[:, 0], kind)
            return None
        if space == "param":
            m = re.match(r"\[\s*(\w+)\s*(?:\+\s*(\d+))?\s*\]", args[1])
            source = frame.params[m[1]]
            for i, name in enumerate(names):
                offset = int(m[2] or 0) + i * t.itemsize
                # Arguments of the kernel are bytes; those and results of functions are one array per word.
                value = source[offset].view(t) if isinstance(source, dict) else np.full(self.n, source[offset : offset + t.itemsize].copy().view(t)[0], t)
                frame.write(name.strip(), value, kind)
            return None
        at = self.address(frame, args[1])[frame.mask]
        data = np.ascontiguousarray(self.load(space, at, t.itemsize * len(names)))
        for i, name in enumerate(names):
            part = np.ascontiguousarray(data[:, i * t.itemsize : (i + 1) * t.itemsize]).view(t)[:, 0]
            value = np.zeros(self.n, t)
            value[frame.mask] = part
            frame.write(name.strip(), value, kind)

    def op_st(self, frame, op, args):
        space, kind = op[1], op[-1]
        t = TYPES[kind]
        if space == "param":
            m = re.match(r"\[\s*(\w+)\s*(?:\+\s*(\d+))?", args[0])
            words = frame.params.setdefault(m[1], {})
            before = words.get(int(m[2] or 0))
            if before is None or before.dtype.itemsize != t.itemsize:  # calls in other scopes use the same names
                before = np.zeros(self.n, t)
            words[int(m[2] or 0)] = np.where(frame.mask, frame.read(args[1], kind, self), before.view(t))
            return
        names = args[1].strip("{}").split(",") if args[1].startswith("{") else [args[1]]
        values = [np.ascontiguousarray(frame.read(x.strip(), kind, self).astype(t)[frame.mask]).view(np.uint8).reshape(-1, t.itemsize) for x in names]
        self.store(space, self.address(frame, args[0])[frame.mask], np.concatenate(values, 1))

    def op_cp(self, frame, op, args):
        if op[2] == "bulk":
            if op[3] not in ("commit_group", "wait_group"):  # stores are done when they are issued
                self.bulk(frame, op, args)
        elif op[2] == "commit_group":
            for w in self.warps_of(frame):
                self.copies[w].append([])
        elif op[2] == "wait_group":
            # The threads of a warp issue, commit and wait alike, so one list serves the warp.
            for w in self.warps_of(frame):
                while len(self.copies[w]) - 1 > int(args[0]):
                    self.deliver(self.copies[w].pop(0))
        else:
            dst, src = self.address(frame, args[0]), self.address(frame, args[1])
            size = frame.read(args[3], "u32", self) if len(args) > 3 else np.full(self.n, 16)
            assert not (dst[frame.mask] % 16).any() and not (src[frame.mask] % 16).any() and args[2] == "16"
            self.store("shared", dst[frame.mask], np.full((frame.mask.sum(), 16), 0xFF, np.uint8))
            for w in self.warps_of(frame):
                m = frame.mask & (self.warp == w)
                self.copies[w][-1].append((dst[m], src[m], size[m]))

    def warps_of(self, frame):
        return np.unique(self.warp[frame.mask])

    def deliver(self, copies):
        for dst, src, size in copies:
            data = np.zeros((len(dst), 16), np.uint8)
            for bytes_of in np.unique(size):
                rows = size == bytes_of
                if bytes_of:
                    data[rows, :bytes_of] = self.load("global", src[rows], int(bytes_of))
            self.store("shared", dst, data)

    # ---- the warp as a whole -------------------------------------------------------------------------------------------

    def whole_warps(self, frame, what):
        m = frame.mask.reshape(-1, 32)
        assert (m.all(1) | ~m.any(1)).all(), f"{what} in a diverged warp"

    def op_bar(self, frame, op, args):
        self.whole_warps(frame, "bar.warp.sync")

    def op_shfl(self, frame, op, args):
        self.whole_warps(frame, "shfl.sync")
        dest = args[0].split("|")[0]
        x, by = frame.read(args[1], "b32", self), frame.read(args[2], "u32", self).astype(np.int64)
        lane = np.arange(self.n) % 32
        source = {"bfly": lane ^ by, "up": lane - by, "down": lane + by, "idx": by & 31}[op[2]]
        source = np.where((source < 0) | (source > 31), lane, source)
        frame.write(dest, x[np.arange(self.n) // 32 * 32 + source], "b32")

    def op_vote(self, frame, op, args):
        self.whole_warps(frame, "vote.sync")
        negate = args[1].startswith("!")
        p = (frame.read(args[1].lstrip("!"), "pred", self) ^ negate).reshape(-1, 32)
        if op[2] == "ballot":
            frame.write(args[0], np.repeat((p.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1).astype(np.uint32), 32), "b32")
        else:
            frame.write(args[0], np.repeat(p.all(1) if op[2] == "all" else p.any(1), 32), "pred")

    def op_match(self, frame, op, args):
        self.whole_warps(frame, "match.sync")
        x = frame.read(args[1], "b32", self).reshape(-1, 32)
        same = (x[:, :, None] == x[:, None, :]).astype(np.uint64) << np.arange(32, dtype=np.uint64)
        frame.write(args[0], same.sum(2).astype(np.uint32).reshape(-1), "b32")

    def op_ldmatrix(self, frame, op, args):
        self.whole_warps(frame, "ldmatrix")
        assert "x4" in op
        trans = "trans" in op
        at = self.address(frame, args[1])
        names = [x.strip() for x in args[0].strip("{}").split(",")]
        out = np.zeros((4, self.n), np.uint32)
        for w in range(0, self.n, 32):
            if not frame.mask[w]:
                continue
            rows = np.ascontiguousarray(self.load("shared", at[w : w + 32], 16)).view(np.uint16).reshape(4, 8, 8)
            assert not (at[w : w + 32] % 16).any()
            if trans:
                rows = rows.transpose(0, 2, 1)
            out[:, w : w + 32] = np.ascontiguousarray(rows).view(np.uint32).reshape(4, 32)
        for i, name in enumerate(names):
            frame.write(name, out[i], "b32")

    def op_mma(self, frame, op, args):
        self.whole_warps(frame, "mma")
        assert op[3] == "m16n8k16" and op[4:6] == ["row", "col"], op
        bf16 = op[7] == "bf16"
        d, a, b, c = ([x.strip() for x in v.strip("{}").split(",")] for v in args)

        def halves(names):
            bits = np.stack([frame.read(x, "b32", self) for x in names]).reshape(len(names), -1, 8, 4)
            lo, hi = bits & 0xFFFF, bits >> 16
            x = np.stack([lo, hi], -1)
            return (x << 16).astype(np.uint32).view(np.float32) if bf16 else x.astype(np.uint16).view(np.float16).astype(np.float32)

        warps = self.n // 32
        A = halves(a).reshape(2, 2, warps, 8, 4, 2).transpose(2, 1, 3, 0, 4, 5).reshape(warps, 16, 16)
        B = halves(b).transpose(1, 0, 3, 4, 2).reshape(warps, 16, 8)
        C = np.stack([frame.read(x, "f32", self) for x in c]).reshape(2, 2, warps, 8, 4)
        C = C.transpose(2, 0, 3, 4, 1).reshape(warps, 16, 8)
        D = (A.astype(np.float64) @ B + C).astype(np.float32).reshape(warps, 2, 8, 4, 2)
        D = D.transpose(1, 4, 0, 2, 3).reshape(4, self.n)
        for i, name in enumerate(d):
            frame.write(name, D[i], "f32")

    def whole_warpgroups(self, frame, what):
        m = frame.mask.reshape(-1, 128)
        assert (m.all(1) | ~m.any(1)).all(), f"{what} in a diverged warpgroup"

    def op_elect(self, frame, op, args):
        self.whole_warps(frame, "elect.sync")
        frame.write(args[0].split("|")[1], np.arange(self.n) % 32 == 0, "pred")

    def op_setmaxnreg(self, frame, op, args):
        self.whole_warpgroups(frame, "setmaxnreg")
        assert op[1] in ("inc", "dec") and 24 <= int(args[0]) <= 256 and int(args[0]) % 8 == 0

    def op_wgmma(self, frame, op, args):
        self.whole_warpgroups(frame, "wgmma")
        if op[1] != "mma_async":  # products are done when they are issued
            assert op[1] in ("fence", "commit_group", "wait_group")
            return
        n = int(re.fullmatch(r"m64n(\d+)k16", op[4])[1])
        assert op[5] == "f32" and op[6] == op[7]
        d, b = [x.strip() for x in args[0].strip("{}").split(",")], args[2]
        assert len(d) == n // 2 and args[4:6] == ["1", "1"]
        trans = [int(x) for x in args[6:]]
        out = np.stack([frame.read(x, "f32", self) for x in d])
        scale = frame.read(args[3], "pred", self)
        i, t = np.arange(n // 2)[:, None], np.arange(128)
        row, col = 16 * (t >> 5) + (t >> 2 & 7) + 8 * (i >> 1 & 1), 8 * (i >> 2) + 2 * (t & 3) + (i & 1)
        for g in range(0, self.n, 128):
            if not frame.mask[g]:
                continue
            if args[1].startswith("{"):
                words = np.stack([frame.read(x.strip(), "b32", self)[g : g + 128] for x in args[1].strip("{}").split(",")])
                A = np.zeros((64, 16), np.float32)
                r = np.arange(4)[:, None]
                for h in range(2):
                    A[16 * (t >> 5) + (t >> 2 & 7) + 8 * (r & 1), 2 * (t & 3) + h + 8 * (r >> 1)] = self.widen((words >> np.uint32(16 * h)).astype(np.uint16), op[6])
            else:
                A = self.operand(frame, args[1], g, 64, trans[0], op[6])
            B = self.operand(frame, b, g, n, trans[-1], op[6])
            D = A.astype(np.float64) @ B.T.astype(np.float64)
            assert (scale[g : g + 128] == scale[g]).all()
            if scale[g]:
                C = np.zeros((64, n))
                C[row, col] = out[:, g : g + 128]
                D += C
            out[:, g : g + 128] = D[row, col]
        for name, x in zip(d, out):
            frame.write(name, x, "f32")

    @staticmethod
    def widen(x, kind):
        return (x.astype(np.uint32) << 16).view(np.float32) if kind == "bf16" else x.view(np.float16).astype(np.float32)

    def operand(self, frame, name, group, rows, trans, kind):
        """(rows, 16) of a tile with a swizzle of 128 bytes."""
        descriptors = frame.read(name, "u64", self)[group : group + 128]
        x = int(descriptors[0])
        assert (descriptors == descriptors[0]).all() and x >> 62 == 1 and not x >> 49 & 7
        start, lead, stride = (x & 0x3FFF) << 4, (x >> 16 & 0x3FFF) << 4, (x >> 32 & 0x3FFF) << 4
        mn, k = np.arange(rows)[:, None], np.arange(16)
        if trans:
            at = start + mn // 64 * lead + mn % 64 * 2 + (k & 7) * 128 + (k >> 3) * stride
        else:
            at = start + (mn >> 3) * stride + (mn & 7) * 128 + 2 * k
        at = (at ^ (at >> 3 & 0x70)).ravel()
        return self.widen(np.ascontiguousarray(self.load("shared", at, 2)).view(np.uint16)[:, 0], kind).reshape(rows, 16)

    # ---- arithmetic ----------------------------------------------------------------------------------------------------

    def _binary(fn):  # noqa: N805
        def op(self, frame, op, args):
            kind = op[-1]
            a, b = (frame.read(x, kind, self) for x in args[1:3])
            frame.write(args[0], fn(a, b), kind)

        return op

    op_sub = _binary(np.subtract)
    op_and, op_or, op_xor = _binary(np.bitwise_and), _binary(np.bitwise_or), _binary(np.bitwise_xor)
    op_min, op_max = _binary(np.fmin), _binary(np.fmax)

    def op_add(self, frame, op, args):
        kind = op[-1]
        a, b = (frame.read(x, kind, self) for x in args[1:3])
        if "rz" not in op:
            return frame.write(args[0], a + b, kind)
        exact = a.astype(np.float64) + b
        near = exact.astype(np.float32)
        frame.write(args[0], np.where(np.abs(near) > np.abs(exact), np.nextafter(near, np.float32(0)), near), kind)

    def op_mul(self, frame, op, args):
        kind = op[-1]
        a, b = (frame.read(x, kind, self) for x in args[1:3])
        if op[1] == "wide":
            wide = kind[0] + str(2 * int(kind[1:]))
            return frame.write(args[0], a.astype(TYPES[wide]) * b.astype(TYPES[wide]), wide)
        assert op[1] != "hi"
        frame.write(args[0], a * b, kind)

    def op_mad(self, frame, op, args):
        assert op[1] == "lo"
        a, b, c = (frame.read(x, op[-1], self) for x in args[1:4])
        frame.write(args[0], a * b + c, op[-1])

    def op_fma(self, frame, op, args):
        a, b, c = (frame.read(x, op[-1], self).astype(np.float64) for x in args[1:4])
        frame.write(args[0], (a * b + c).astype(TYPES[op[-1]]), op[-1])

    def op_div(self, frame, op, args):
        kind = op[-1]
        a, b = (frame.read(x, kind, self) for x in args[1:3])
        if kind[0] == "f":
            return frame.write(args[0], a / b, kind)
        b = np.where(b == 0, 1, b).astype(b.dtype)
        q = np.abs(a) // np.abs(b)
        frame.write(args[0], (np.where((a < 0) != (b < 0), -q, q) if kind[0] == "s" else a // b).astype(a.dtype), kind)

    def op_rem(self, frame, op, args):
        a, b = (frame.read(x, op[-1], self) for x in args[1:3])
        frame.write(args[0], np.fmod(a, np.where(b == 0, 1, b).astype(b.dtype)), op[-1])

    def _unary(fn):  # noqa: N805
        def op(self, frame, op, args):
            frame.write(args[0], fn(frame.read(args[1], op[-1], self)), op[-1])

        return op

    op_neg, op_abs, op_sqrt = _unary(np.negative), _unary(np.abs), _unary(np.sqrt)
    op_ex2, op_lg2 = _unary(np.exp2), _unary(np.log2)
    op_rcp = _unary(lambda x: (1 / x).astype(x.dtype))
    op_clz = _unary(lambda x: (32 - np.frexp(x.view(np.uint32).astype(np.float64))[1]).astype(x.dtype))

    def op_not(self, frame, op, args):
        x = frame.read(args[1], op[-1], self)
        frame.write(args[0], ~x, op[-1])

    def op_shl(self, frame, op, args):
        a, n = frame.read(args[1], op[-1], self), frame.read(args[2], "u32", self)
        bits = a.dtype.itemsize * 8
        frame.write(args[0], np.where(n >= bits, 0, a << np.minimum(n, bits - 1).astype(a.dtype)), op[-1])

    def op_shr(self, frame, op, args):
        a, n = frame.read(args[1], op[-1], self), frame.read(args[2], "u32", self)
        bits = a.dtype.itemsize * 8
        shifted = a >> np.minimum(n, bits - 1).astype(a.dtype)
        frame.write(args[0], shifted if op[-1][0] == "s" else np.where(n >= bits, 0, shifted), op[-1])

    def op_bfi(self, frame, op, args):
        t = TYPES[op[-1]]
        a, b = (frame.read(x, op[-1], self) for x in args[1:3])
        start, length = int(args[3]), int(args[4])
        field = t.type(((1 << length) - 1) << start)
        frame.write(args[0], (b & ~field) | (a << t.type(start) & field), op[-1])

    def op_prmt(self, frame, op, args):
        both = np.stack([frame.read(x, "b32", self) for x in args[1:3]], 1).view(np.uint8)
        choice = int(args[3], 0)
        picked = [both[:, choice >> 4 * i & 7] for i in range(4)]
        assert not choice & 0x8888
        frame.write(args[0], np.ascontiguousarray(np.stack(picked, 1)).view(np.uint32)[:, 0], "b32")

    def op_selp(self, frame, op, args):
        a, b = (frame.read(x, op[-1], self) for x in args[1:3])
        frame.write(args[0], np.where(frame.read(args[3], "pred", self), a, b), op[-1])

    def op_setp(self, frame, op, args):
        kind = op[-1]
        a, b = (frame.read(x, kind, self) for x in args[1:3])
        name = op[1]
        if name in ("nan", "num"):
            value = np.isnan(a) | np.isnan(b)
            value = value if name == "nan" else ~value
        elif name.endswith("u") and kind[0] == "f":  # true on NaN too
            value = COMPARE[name[:-1]](a, b) | np.isnan(a) | np.isnan(b)
        elif name == "ne" and kind[0] == "f":
            value = (a != b) & ~np.isnan(a) & ~np.isnan(b)
        else:
            value = COMPARE[name](a, b)
        frame.write(args[0], value, "pred")

    def op_mov(self, frame, op, args):
        if args[1].startswith("{"):
            lo, hi = (frame.read(x.strip(), "b16" if op[-1] == "b32" else "b32", self) for x in args[1].strip("{}").split(","))
            half = lo.dtype.itemsize * 8
            return frame.write(args[0], lo.astype(TYPES[op[-1]]) | hi.astype(TYPES[op[-1]]) << TYPES[op[-1]].type(half), op[-1])
        if args[0].startswith("{"):
            x = frame.read(args[1], op[-1], self)
            half = x.dtype.itemsize * 4
            for i, name in enumerate(args[0].strip("{}").split(",")):
                frame.write(name.strip(), x >> x.dtype.type(half * i), f"b{half}")
            return None
        frame.write(args[0], frame.read(args[1], op[-1], self), op[-1])

    def op_cvta(self, frame, op, args):
        x = frame.read(args[1], "u64", self)
        if op[1] == "param":  # an offset into the kernel's arguments becomes the place where they lie
            x = x + np.uint64(frame.params[frame.f.params[0]].ctypes.data)
        frame.write(args[0], x, "u64")

    def op_cvt(self, frame, op, args):
        kinds = [x for x in op if x in TYPES or x in ("bf16", "bf16x2", "f16x2")]
        to, source = kinds[0], kinds[1]
        modes = {"rni": np.rint, "rmi": np.floor, "rzi": np.trunc, "rpi": np.ceil}
        if to in ("bf16x2", "f16x2"):  # the first source goes to the upper half
            upper, lower = (narrow(frame.read(x, source, self), to[:-2]).astype(np.uint32) for x in args[1:3])
            return frame.write(args[0], upper << 16 | lower, "b32")
        x = frame.read(args[1], source, self)
        if to in ("bf16", "f16"):
            return frame.write(args[0], narrow(x, to), "b16")
        for name, fn in modes.items():
            if name in op:
                x = fn(x)
        frame.write(args[0], x.astype(TYPES[to]), to)

    def op_call(self, frame, op, args):
        *result, name, params = args
        f = self.functions[name]
        values = [frame.params[x.strip()] for x in params.strip("()").split(",")]
        inner = Frame(f, self.n, dict(zip(f.params, values)))
        self.run(inner, frame.mask.copy())
        for x in result:
            frame.params[x.strip("()").strip()] = inner.params["func_retval0"]


def narrow(x, to):
    """float32 to the bits of bf16 or f16, to nearest even."""
    if to == "f16":
        return x.astype(np.float16).view(np.uint16)
    u = x.view(np.uint32).astype(np.uint64)
    rounded = (u + 0x7FFF + (u >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


class Frame:
    """Registers and parameters of one call of a function."""

    def __init__(self, f, n, params):
        self.f, self.n, self.params = f, n, params
        self.registers: dict[str, np.ndarray] = {}
        self.constants: dict = {}
        self.mask, self.everyone = None, False

    def register(self, name):
        r = self.registers.get(name)
        if r is None:
            kind = self.f.registers.get(name) or self.f.registers[name.rstrip("0123456789")]
            r = self.registers[name] = np.zeros(self.n, kind)
        return r

    def read(self, operand, kind, block):
        if operand in block.special:
            return block.special[operand]
        t = TYPES[kind]
        if operand[0] == "%":
            r = self.register(operand)
            if r.dtype == t:
                return r
            return r.view(t) if r.dtype.itemsize == t.itemsize else r.astype(np.dtype(f"u{t.itemsize}")).view(t)
        key = operand, kind
        if key not in self.constants:
            if operand.startswith("0f"):
                value = np.array([int(operand[2:], 16)], np.uint32).view(np.float32).astype(t)
            elif operand.startswith("0d"):
                value = np.array([int(operand[2:], 16)], np.uint64).view(np.float64).astype(t)
            elif re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", operand):
                value = np.array([int(operand.rstrip("U"), 0) & (2 ** (8 * t.itemsize) - 1)], np.dtype(f"u{t.itemsize}")).view(t) if kind != "pred" else np.array([int(operand) != 0])
            else:  # a symbol: the shared block, which starts at 0
                value = np.zeros(1, t)
            self.constants[key] = np.repeat(value, self.n)
        return self.constants[key]

    def write(self, name, value, kind):
        if name == "_":
            return
        r = self.register(name)
        if r.dtype == bool:
            value = value.astype(bool)
        else:
            value = np.ascontiguousarray(value.astype(TYPES[kind], copy=False))
            if value.dtype.kind == "i" and value.dtype.itemsize < r.dtype.itemsize:
                value = value.astype(np.dtype(f"i{r.dtype.itemsize}"))
            value = value.view(np.dtype(f"u{value.dtype.itemsize}"))
            if value.dtype.itemsize != r.dtype.itemsize:
                value = value.astype(np.dtype(f"u{r.dtype.itemsize}"))
            value = value.view(r.dtype)
        if self.everyone:
            self.registers[name] = value.copy()
        else:
            r[self.mask] = value[self.mask]


def launch(functions, entry, arguments, blocks, threads, shared):
    """Runs every block of a launch. Returns how many instructions were executed."""
    with np.errstate(all="ignore"):
        return sum(Block(functions, entry, arguments, threads, shared, b, blocks).executed for b in range(blocks))
