#!/usr/bin/python3
# SPDX-License-Identifier: MIT
"""Writes the malformed files of tests/bad (safetensors, pt, model_json) and the seeds of tests/fuzz/corpus.

A case is a folder with `input` and `error`; each line of `error` must be found in "STATUS [param] text". A case can as well be added by hand. PyTorch
is not needed: its names are stood in for by empty modules, since a pickle only holds names.
"""
import argparse, collections, copy, io, json, os, pickle, shutil, struct, sys, types, warnings, zipfile

HERE = os.path.dirname(os.path.abspath(__file__))
CORPUS = os.path.join(HERE, "..", "fuzz", "corpus")


def write(path, data):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as f:
        f.write(data)


def case(kind, name, data, *error):
    write(f"{HERE}/{kind}/{name}/input", data)
    write(f"{HERE}/{kind}/{name}/error", "".join(line + "\n" for line in error).encode())
    if len(data) <= 4096:
        seed(kind, "bad-" + name, data)


def seed(kind, name, data):
    write(f"{CORPUS}/{kind}/{name}", data)


# --- safetensors

def st(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def safetensors():
    def bad(name, data, *error):
        case("safetensors", name, data, *error)

    two = {"a": entry([2], 0, 8), "b": entry([1], 8, 12)}
    good = st({"__metadata__": {"format": "pt"}, **two}, bytes(12))
    seed("safetensors", "good", good)
    seed("safetensors", "good-types", st({"s": entry([], 0, 4), "e": entry([0, 3], 4, 4, "I64"), "h": entry([3], 4, 10, "BF16"), "u": entry([2], 10, 14, "U16"),
                                          "f": entry([2], 14, 15, "F4")}, bytes(15)))
    seed("safetensors", "bare", json.dumps(two).encode() + b"\0" + bytes(12))
    diffusers = {f"transformer_blocks.0.attn1.to_{x}.{kind}": [2, 1] if kind == "weight" else [2] for x in "qkv" for kind in ("weight", "bias")}

    def laid_out(changes):
        header, at = {}, 0
        for name, shape in {**diffusers, **changes}.items():
            if shape is not None:
                size = 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
                header[name] = entry(shape, at, at + size)
                at += size
        return st(header, bytes(at))

    seed("safetensors", "good-diffusers", laid_out({}))
    seed("safetensors", "good-wrapped", laid_out({k: None for k in diffusers} | {"module.model.x_embedder.proj.weight": [1], "module.model.pos_embed": [1]}))
    bad("diffusers-no-key", laid_out({"transformer_blocks.0.attn1.to_k.bias": None}), "E_CONFLICT", "'transformer_blocks.0.attn1.to_k.bias' is missing")
    bad("diffusers-other-shape", laid_out({"transformer_blocks.0.attn1.to_v.weight": [4, 1]}), "E_CONFLICT", "differs from its block's query")
    bad("diffusers-stranger", laid_out({"transformer_blocks.0.attn1.norm_q.weight": [2]}), "E_CONFLICT [transformer_blocks.0.attn1.norm_q.weight]",
        "no place in diffusers' DiT")
    bad("diffusers-outer-stranger", laid_out({"caption_projection.weight": [2]}), "E_CONFLICT [caption_projection.weight]", "no place in diffusers' DiT")
    bad("diffusers-block-two-names", laid_out({"transformer_blocks.00.attn1.to_q.bias": [2]}), "E_CONFLICT", "no place in diffusers' DiT")
    bad("diffusers-far-block", laid_out({"transformer_blocks.99999.attn1.to_q.bias": [2]}), "E_RANGE", "100000 blocks")
    bad("wrapped-twice", laid_out({k: None for k in diffusers} | {"model.x_embedder.proj.weight": [1], "x_embedder.proj.weight": [1]}),
        "E_FORMAT [x_embedder.proj.weight]", "appears twice")
    bad("empty", b"", "E_FORMAT", "the file is empty")
    for n in (3, 7, 8):
        bad(f"truncated-at-{n}", good[:n], "E_FORMAT", "neither a PyTorch zip")
    bad("truncated-in-header", good[:20], "E_FORMAT", "ends inside the header")
    bad("truncated-in-data", good[:-5], "E_FORMAT [", "beyond the end of the file")
    bad("header-of-101-MB", st(two, bytes(12), 101000000), "E_FORMAT", "101000000 bytes; at most 100000000")
    bad("header-beyond-file", st(two, bytes(12), 5000), "E_FORMAT", "ends inside the header")
    bad("header-cut-short", st(two, bytes(12), 20), "E_FORMAT", "not valid JSON")
    bad("header-zero", st(b"{", b"", 0), "E_FORMAT", "does not begin with '{'")
    bad("no-object", st(b"[1]"), "E_FORMAT", "neither a PyTorch zip")
    bad("not-json", st(b'{"a": nope}'), "E_FORMAT", "not valid JSON")
    bad("bad-utf8", st(b'{"a\xff": {"dtype":"F32","shape":[],"data_offsets":[0,4]}}', bytes(4)), "E_FORMAT", "not valid JSON")
    bad("duplicate-key", st(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}', bytes(2)), "E_FORMAT",
        "duplicate")
    bad("duplicate-field", st(b'{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', bytes(1)), "E_FORMAT", "duplicate")
    bad("overlap", st({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)), "E_FORMAT [b]", "overlap")
    bad("overlap-same", st({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, bytes(8)), "E_FORMAT [", "overlap")
    bad("hole", st({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)), "E_FORMAT [b]", "belong to no tensor")
    bad("hole-at-start", st({"a": entry([1], 4, 8)}, bytes(8)), "E_FORMAT [a]", "belong to no tensor")
    bad("trailing-bytes", st(two, bytes(20)), "E_FORMAT", "8 bytes at the end of the file belong to no tensor")
    bad("wrong-shape", st({"a": entry([3], 0, 8)}, bytes(8)), "E_FORMAT [a]", "as many bytes")
    bad("wrong-dtype", st({"a": entry([2], 0, 8, "F64")}, bytes(8)), "E_FORMAT [a]", "as many bytes")
    bad("shape-overflows", st({"a": entry([1 << 62, 8], 0, 0)}), "E_FORMAT [a]", "overflows")
    bad("bytes-overflow", st({"a": entry([1 << 62], 0, 0)}), "E_FORMAT [a]", "overflows")
    bad("empty-but-overflows", st({"a": entry([0, 1 << 62], 0, 0)}), "E_FORMAT [a]", "overflows")
    bad("empty-but-overflows-first", st({"a": entry([1 << 62, 0], 0, 0)}), "E_FORMAT [a]", "overflows")
    bad("negative-size", st({"a": entry([-2], 0, 8)}, bytes(8)), "E_FORMAT [a]", "something else than sizes")
    bad("fractional-size", st({"a": entry([2.0], 0, 8)}, bytes(8)), "E_FORMAT [a]", "something else than sizes")
    bad("huge-integer", st(b'{"a":{"dtype":"U8","shape":[99999999999999999999],"data_offsets":[0,1]}}', bytes(1)), "E_FORMAT", "not valid JSON")
    bad("rank-9", st({"a": entry([1] * 9, 0, 4)}, bytes(4)), "E_FORMAT [a]", "more than 8 dimensions")
    bad("half-byte", st({"a": entry([3], 0, 1, "F4")}, bytes(1)), "E_FORMAT [a]", "whole bytes")
    bad("unknown-dtype", st({"a": entry([2], 0, 8, "Q8")}, bytes(8)), "E_FORMAT [a]", "unknown dtype")
    bad("unknown-field", st({"a": {**entry([2], 0, 8), "offset": 1}}, bytes(8)), "E_FORMAT [a]", "unknown field")
    bad("no-dtype", st({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)), "E_FORMAT [a]", "dtype is missing")
    bad("no-shape", st({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)), "E_FORMAT [a]", "shape is missing")
    bad("no-offsets", st({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "E_FORMAT [a]", "data_offsets")
    bad("three-offsets", st({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}}, bytes(8)), "E_FORMAT [a]", "two integers")
    bad("offsets-reversed", st({"a": entry([2], 8, 0)}, bytes(8)), "E_FORMAT [a]", "rising")
    bad("offset-negative", st({"a": entry([2], -8, 0)}, bytes(8)), "E_FORMAT [a]", "non-negative")
    bad("offset-beyond", st({"a": entry([2], 0, 1 << 40)}, bytes(8)), "E_FORMAT [a]", "beyond the end")
    bad("entry-is-a-list", st({"a": [1]}, bytes(8)), "E_FORMAT [a]", "not an object")
    bad("metadata-not-string", st({"__metadata__": {"a": 1}}), "E_FORMAT [__metadata__]", "something else than strings")
    bad("metadata-list", st({"__metadata__": ["a"]}), "E_FORMAT [__metadata__]", "not an object")
    bad("metadata-control", st({"__metadata__": {"a\n": "b"}}), "E_FORMAT [__metadata__]", "control character")
    bad("name-with-newline", st({"a\nlevel=error": entry([2], 0, 8)}, bytes(8)), "E_FORMAT [a?level=error]", "control character")
    bad("name-too-long", st({"a" * 600: entry([2], 0, 8)}, bytes(8)), "E_FORMAT", "too long")
    bad("deep", st(b'{"a":' + b"[" * 1000 + b"]" * 1000 + b"}"), "E_FORMAT", "nested deeper than 3")
    bad("git-lfs-pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "E_FORMAT", "Git LFS")
    bad("name-twice-behind-prefixes", st({"module.a": entry([2], 0, 8), "_orig_mod.a": entry([1], 8, 12)}, bytes(12)), "E_FORMAT [a]", "appears twice")


# --- .pt

def module(name, **members):
    m = sys.modules.setdefault(name, types.ModuleType(name))
    for key, value in members.items():
        value.__module__, value.__qualname__, value.__name__ = name, key, key
        setattr(m, key, value)
    return m


def stand_in():
    return type("C", (), {})


def function():
    def f(*args):
        raise AssertionError
    return f


torch = module("torch", **{k: stand_in() for k in ("FloatStorage", "BFloat16Storage", "ByteStorage", "LongStorage", "QInt8Storage", "UntypedStorage", "Size", "device", "float32")})
torch._utils = module("torch._utils", _rebuild_tensor_v2=function(), _rebuild_tensor_v3=function(), _rebuild_parameter=function())
trainer = module("trainer", Model=stand_in(), weird=function())


class Storage:
    def __init__(self, key, numel, kind="FloatStorage", data=None):
        self.key, self.numel, self.kind = key, numel, kind
        self.data = bytes(range(256)) * (numel // 64 + 1) if data is None else data
        size = {"FloatStorage": 4, "BFloat16Storage": 2, "LongStorage": 8}.get(kind, 1)
        if data is None:
            self.data = self.data[:numel * size]


class Tensor:
    def __init__(self, storage, shape, stride=None, offset=0, make=None):
        if stride is None:
            stride, n = [], 1
            for s in reversed(shape):
                stride.insert(0, n)
                n *= s
        self.storage, self.shape, self.stride, self.offset, self.make = storage, tuple(shape), tuple(stride), offset, make

    def __reduce__(self):
        if self.make:
            return self.make(self)
        return torch._utils._rebuild_tensor_v2, (self.storage, self.offset, self.shape, self.stride, False, collections.OrderedDict())


class Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        if isinstance(obj, Storage):
            return ("storage", getattr(torch, obj.kind), obj.key, "cpu", obj.numel)
        return None


def dumps(value, protocol=2):
    out = io.BytesIO()
    Pickler(out, protocol).dump(value)
    return out.getvalue()


def archive(members, compress=zipfile.ZIP_STORED):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compress) as z:
        for name, data in members:
            z.writestr(zipfile.ZipInfo(name), data, compress)
    return out.getvalue()


def pt(value, storages=(), protocol=2, more=(), stem="t"):
    data = value if isinstance(value, bytes) else dumps(value, protocol)
    return archive([(f"{stem}/data.pkl", data)] + [(f"{stem}/data/{s.key}", s.data) for s in storages] + list(more))


def patch(data, find, offset, new, last=False):
    at = (data.rindex if last else data.index)(find) + offset
    return data[:at] + new + data[at + len(new):]


def call(name, data):
    """In a pickle of protocol 2, puts module.name in the place of the stand-in trainer.weird."""
    where, what = name.rsplit(".", 1)
    assert b"ctrainer\nweird\n" in data
    return data.replace(b"ctrainer\nweird\n", f"c{where}\n{what}\n".encode())


class Called:
    def __reduce__(self):
        return trainer.weird, ("touch /tmp/owned",)


def pickles():
    def bad(name, data, *error):
        case("pt", name, data, *error)

    s = Storage("0", 64)
    t = Tensor(s, [2, 3])
    args = argparse.Namespace(model="SiT-S/2", lr=1e-4, num_heads=6, flag=True, none=None, tags=["a"])
    full = {"ema": collections.OrderedDict(a=t, b=Tensor(s, [3, 2], [1, 3], 5)), "model": {"a": Tensor(s, [6])}, "opt": {"state": {}}, "args": args, "steps": 12}
    for protocol in (2, 3, 4, 5):
        seed("pt", f"good-protocol-{protocol}", pt(full, [s], protocol))
        seed("pt", f"pickle-{protocol}", dumps(full, protocol))
    good = pt({"a": t}, [s], more=[("t/byteorder", b"little"), ("t/version", b"3\n")])
    seed("pt", "good-bare", good)
    untyped = Storage("0", 256, "UntypedStorage")
    v3 = {"a": Tensor(untyped, [4], make=lambda x: (torch._utils._rebuild_tensor_v3, (x.storage, 0, x.shape, x.stride, False, collections.OrderedDict(),
                                                                                     torch.float32)))}
    parameter = {"a": Tensor(s, [4], make=lambda x: (torch._utils._rebuild_parameter, (Tensor(s, [4]), True, collections.OrderedDict())))}
    for name, value, storage in (("v3", v3, untyped), ("parameter", parameter, s)):
        seed("pt", "good-" + name, pt(value, [storage]))
        seed("pt", "pickle-" + name, dumps(value))

    # archives
    end = good.rindex(b"PK\5\6")
    directory = good.index(b"PK\1\2")
    for name, cut in {"in-local-header": 20, "in-pickle": 90, "in-data": directory - 40, "in-directory": directory + 30, "in-end": end + 10,
                      "before-end": end, "one-byte": len(good) - 1}.items():
        bad(f"truncated-{name}", good[:cut], "E_FORMAT", "no end record")
    bad("bytes-behind-end", good + b"x", "E_FORMAT", "no end record")
    bad("compressed", archive([("t/data.pkl", dumps({"a": t})), ("t/data/0", s.data)], zipfile.ZIP_DEFLATED), "E_UNSUPPORTED [t/data.pkl]", "is compressed")
    bad("encrypted", patch(good, b"PK\1\2", 8, b"\1\0"), "E_UNSUPPORTED [t/data.pkl]", "encrypted")
    bad("two-disks", patch(good, b"PK\5\6", 4, b"\1\0"), "E_UNSUPPORTED", "several disks")
    bad("directory-elsewhere", patch(good, b"PK\5\6", 16, b"\1\0\0\0"), "E_FORMAT", "directory is not where")
    bad("directory-too-short", patch(good, b"PK\5\6", 8, b"\xff\x03\xff\x03"), "E_FORMAT", "too short for the entries")
    bad("directory-has-more", patch(good, b"PK\5\6", 8, b"\2\0\2\0"), "E_FORMAT", "longer than its entries")
    bad("size-beyond-data", patch(patch(good, b"PK\1\2", 20, b"\xff\xff\0\0"), b"PK\1\2", 24, b"\xff\xff\0\0"), "E_FORMAT [t/data.pkl]", "beyond the data")
    bad("size-of-4-GiB", patch(patch(good, b"PK\1\2", 20, b"\xff" * 4), b"PK\1\2", 24, b"\xff" * 4), "E_FORMAT [t/data.pkl]", "beyond the data")
    bad("two-sizes", patch(good, b"PK\1\2", 20, b"\1\0\0\0"), "E_FORMAT [t/data.pkl]", "two different sizes")
    bad("size-into-next", patch(patch(good, b"PK\1\2", 20, b"\x80\1\0\0"), b"PK\1\2", 24, b"\x80\1\0\0"), "E_FORMAT", "overlap")
    into_header = struct.pack("<I", struct.unpack_from("<I", good, directory + 24)[0] + 10)
    bad("size-into-header", patch(patch(good, b"PK\1\2", 20, into_header), b"PK\1\2", 24, into_header), "E_FORMAT", "overlap")
    bad("offset-beyond", patch(good, b"PK\1\2", 42, b"\xf0\xff\xff\x7f"), "E_FORMAT [t/data.pkl]", "outside the file")
    bad("offset-to-nothing", patch(good, b"PK\1\2", 42, b"\2\0\0\0"), "E_FORMAT [t/data.pkl]", "no local header")
    bad("other-name", patch(good, b"t/data.pkl", 2, b"fake"), "E_FORMAT", "another name")
    second = good.index(b"PK\1\2", directory + 4)
    bad("same-member-twice", patch(good[:second] + good[directory:second] + good[end:], b"PK\5\6", 8, struct.pack("<HHI", 2, 2, 2 * (second - directory))), "E_FORMAT", "overlap")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bad("duplicate-member", archive([("t/data.pkl", dumps({"a": t})), ("t/data/0", s.data), ("t/data/0", s.data)]), "E_FORMAT", "same name")
    bad("two-pickles", archive([("t/data.pkl", b""), ("u/data.pkl", b"")]), "E_FORMAT", "two data.pkl")
    bad("no-pickle", archive([("arr_0.npy", b"x")]), "E_FORMAT", "no data.pkl")
    bad("zip64-field-short", patch(good, b"PK\1\2", 42, b"\xff" * 4), "E_FORMAT", "outside the file")
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, 1 << 60, 1)
    bad("zip64-record-beyond", good[:end] + locator + good[end:], "E_FORMAT", "ZIP64 end record")
    bad("big-endian", pt({"a": t}, [s], more=[("t/byteorder", b"big")]), "E_UNSUPPORTED", "big-endian")
    bad("legacy", bytes.fromhex("80028a0a6cfc9c46f9206aa850192e") + b"\x80\x02M\xe9\x03.", "E_UNSUPPORTED", "before PyTorch 1.6", "torch.save(torch.load(")
    bad("bare-pickle", dumps({"a": 1}), "E_UNSUPPORTED", "bare Python pickle")

    # names
    def call_case(name, what, value, *error):
        bad(name, pt(call(what, dumps(value)), [s]), *error)

    c = Called()
    call_case("os-system", "os.system", c, "E_UNSUPPORTED", "'os.system'", "refused")
    call_case("os-system-in-args", "os.system", {"model": {"a": t}, "args": c}, "E_UNSUPPORTED", "'os.system'")
    call_case("posix-system-in-model", "posix.system", {"model": {"a": c}}, "'posix.system'")
    call_case("builtins-eval", "builtins.eval", {"model": {"a": t}, "opt": c}, "'builtins.eval'")
    call_case("python-2-exec", "__builtin__.execfile", c, "'__builtin__.execfile'")
    call_case("submodule", "importlib.machinery.load", c, "'importlib.machinery.load'")
    bad("os-system-stack-global", pt(b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02id\x85R."), "E_UNSUPPORTED", "'os.system'")
    bad("subprocess-newobj-ex", pt(b"\x80\x04\x8c\x0asubprocess\x8c\x05Popen\x93)}\x92."), "E_UNSUPPORTED", "'subprocess.Popen'")
    call_case("unknown-object-in-model", "trainer.weird", {"model": {"a": c}}, "E_UNSUPPORTED", "'a' in 'model'", "an object of 'trainer.weird'")
    call_case("unknown-object-at-top", "trainer.weird", c, "E_UNSUPPORTED", "an object of 'trainer.weird'", "state_dict()")
    seed("pt", "good-unknown-in-args", pt(call("pathlib.PosixPath", dumps({"model": {"a": t}, "args": {"out": c, "lr": 0.1}})), [s]))
    bad("model-is-a-module", pt({"model": trainer.Model()}, protocol=2), "E_UNSUPPORTED [model]", "state_dict()")
    bad("ema-is-a-list", pt({"ema": [1], "model": {"a": t}}, [s]), "E_UNSUPPORTED [ema]", "'ema' is a list")
    bad("name-with-newline-protocol-4", pt(b"\x80\x04\x8c\x03o\ns\x8c\x01x\x93."), "E_FORMAT", "no proper name")

    # dictionaries
    bad("no-tensors", pt({"opt": {}, "epoch": 3}), "E_CONFLICT", "no tensors")
    bad("empty-dict", pt({}), "E_CONFLICT", "no tensors")
    bad("integer-key", pt({"model": {1: t}}, [s]), "E_FORMAT", "no proper tensor name")
    bad("name-with-control", pt({"model": {"a\x1b[2J": t}}, [s]), "E_FORMAT", "no proper tensor name")
    bad("number-in-model", pt({"model": {"a": t, "step": 3}}, [s]), "E_UNSUPPORTED", "'step' in 'model' is an integer")
    bad("name-twice", pt({"model": {"module.a": t, "a": t}}, [s]), "E_FORMAT [a]", "appears twice")

    # tensors
    def tensor(name, x, *error, storages=(s,)):
        bad(name, pt({"model": {"w": x}}, storages), *error)

    tensor("storage-missing", t, "E_FORMAT [w]", "not in the file", storages=())
    tensor("storage-too-short", t, "E_FORMAT [w]", "as many bytes", storages=(Storage("0", 64, data=bytes(255)),))
    tensor("storage-too-long", t, "E_FORMAT [w]", "as many bytes", storages=(Storage("0", 64, data=bytes(257)),))
    tensor("storage-key-climbs", Tensor(Storage("../data.pkl", 64), [2]), "E_FORMAT [w]", "not in the file")
    tensor("storage-size-overflows", Tensor(Storage("0", (1 << 63) - 1, data=b""), [2]), "E_FORMAT [w]", "overflows")
    tensor("storage-unknown-type", Tensor(Storage("0", 64, "QInt8Storage"), [2]), "E_UNSUPPORTED", "'torch.QInt8Storage'")
    tensor("offset-beyond", Tensor(s, [2], offset=63), "E_FORMAT [w]", "beyond its storage")
    tensor("empty-offset-beyond", Tensor(s, [0], offset=65), "E_FORMAT [w]", "beyond its storage")
    tensor("shape-beyond", Tensor(s, [65]), "E_FORMAT [w]", "beyond its storage")
    tensor("stride-giant", Tensor(s, [2, 2], [1 << 62, 1]), "E_FORMAT [w]", "beyond its storage")
    tensor("stride-overflows", Tensor(s, [9, 9], [1 << 61, 1 << 61]), "E_FORMAT [w]", "strides overflow")
    tensor("stride-wraps-to-small", Tensor(s, [3, 5], [1 << 62, 1 << 61]), "E_FORMAT [w]")
    tensor("stride-negative", Tensor(s, [2], [-1]), "E_FORMAT", "something else than sizes")
    tensor("shape-negative", Tensor(s, [-2], [1]), "E_FORMAT", "something else than sizes")
    tensor("shape-overflows", Tensor(s, [1 << 40, 1 << 40], [0, 0]), "E_FORMAT [w]", "shape overflows")
    tensor("expands-to-a-terabyte", Tensor(s, [1 << 38], [0]), "E_RANGE [w]", "expand")
    tensor("expands-bytes", Tensor(Storage("0", 64, "ByteStorage"), [1 << 62, 2], [0, 0]), "E_RANGE [w]", "expand", storages=(Storage("0", 64, "ByteStorage"),))
    bad("expands-many-times", pt({"model": {f"w{i}": Tensor(s, [1 << 22], [0]) for i in range(5)}}, [s]), "E_RANGE [w4]", "expand")
    tensor("rank-9", Tensor(s, [1] * 9), "E_FORMAT", "more than 8 dimensions")
    tensor("strides-too-few", Tensor(s, [1, 2], [1]), "E_FORMAT", "as many strides")
    tensor("shape-is-a-string", Tensor(s, "ab", [1]), "E_FORMAT", "something else than sizes")
    tensor("shape-of-longs", Tensor(s, [1 << 100], [1]), "E_FORMAT", "something else than sizes")
    tensor("storage-is-a-number", Tensor(7, [1]), "E_FORMAT", "not made of (storage")

    # the machine
    def raw(name, body, *error):
        bad(name, pt(b"\x80\x02" + body), *error)

    raw("empty-pickle", b"", "E_FORMAT", "ends without STOP")
    bad("pickle-of-no-bytes", pt(b""), "E_FORMAT", "protocol")
    bad("protocol-0", pt(b"(dp0\n."), "E_FORMAT", "protocol")
    bad("protocol-9", pt(b"\x80\x09}."), "E_FORMAT", "protocol")
    raw("text-opcode", b"I1\n.", "E_FORMAT", "opcode 0x49")
    raw("extension-opcode", b"\x82\x01.", "E_FORMAT", "opcode 0x82")
    raw("instance-opcode", b"(ios\nsystem\n.", "E_FORMAT", "opcode 0x69")
    raw("stack-empty", b".", "E_FORMAT", "no value on the stack")
    raw("stack-left", b"NN.", "E_FORMAT", "left on the stack")
    raw("mark-missing", b"Nt.", "E_FORMAT", "no mark")
    raw("mark-as-value", b"(\x85.", "E_FORMAT", "no value")
    raw("append-to-mark", b"(N(Ne.", "E_FORMAT")
    raw("append-to-number", b"K\x01Na.", "E_FORMAT", "no container")
    raw("setitems-odd", b"}(Nu.", "E_FORMAT", "key without a value")
    raw("bytes-behind-stop", b"}.x", "E_FORMAT", "behind STOP")
    raw("string-beyond", b"X\xff\xff\xff\x7fab.", "E_FORMAT", "16 MiB")
    raw("string-beyond-end", b"X\xff\x00\x00\x00ab.", "E_FORMAT", "ends inside")
    raw("long-beyond-end", b"\x8b\xff\xff\xff\x7f.", "E_FORMAT", "ends inside")
    raw("frame-beyond", b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f}.", "E_FORMAT", "frame")
    raw("global-without-end", b"cos", "E_FORMAT", "inside a global")
    raw("memo-not-there", b"h\x05.", "E_FORMAT", "memo")
    raw("memo-giant", b"Nr\xf0\xff\xff\xff.", "E_FORMAT", "memo index")
    raw("nested-marks", b"(" * 1001 + b".", "E_FORMAT", "nested deeper than 1000")
    raw("nested-lists", b"]" + b"\x85" * 3000 + b".", "E_UNSUPPORTED", "the file holds a tuple")
    raw("laughs", b"]q\0" + b"".join(b"](" + b"h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) for i in range(60)) + b"0" * 60 + b".", "E_UNSUPPORTED",
        "the file holds a list")
    raw("dict-grows-by-build", b"cargparse\nNamespace\n)R}(" + b"K\x01N" * 4000 + b"uq\x01" + b"b" + b"h\x01b" * 6000 + b".", "E_FORMAT", "256 MiB")
    raw("persistent-id-odd", b"NQ.", "E_FORMAT", "persistent id")
    raw("call-of-number", b"K\x01)R.", "E_FORMAT", "not a name")
    raw("call-without-tuple", b"cargparse\nNamespace\nNR.", "E_FORMAT", "than a tuple")
    raw("list-in-itself", b"]q\0h\0a.", "E_UNSUPPORTED", "the file holds a list")
    raw("dict-in-itself", b"}q\0X\5\0\0\0modelh\0s.", "E_UNSUPPORTED", "'model' in 'model' is a dictionary")


# --- model.json

GOOD = {"format": 1, "family": "sit",
        "architecture": {"input_size": 32, "patch_size": 4, "in_channels": 1, "hidden_size": 192, "depth": 8, "num_heads": 3, "mlp_ratio": 4, "num_classes": 2,
                         "class_dropout": True, "learn_sigma": True},
        "path": "linear", "prediction": "velocity", "guidance": {"channels": 3}, "labels": ["shirt", ["ankle boot", "boot"]], "default": True,
        "weights": {"file": "weights-00000007.safetensors", "sha256": "0" * 64}, "step": 7}
DROP = object()


def changed(path, value, of=GOOD):
    d = copy.deepcopy({k: v for k, v in of.items() if v is not DROP})
    *folders, last = path.split(".")
    at = d
    for f in folders:
        at = at[f]
    if value is DROP:
        del at[last]
    else:
        at[last] = value
    return json.dumps(d, indent=1).encode()


def model_json():
    def bad(name, data, *error):
        case("model_json", name, data, *error)

    def field(name, path, value, status, *error):
        bad(name, changed(path, value), f"{status} [{path}]", *error)

    good = json.dumps(GOOD).encode()
    seed("model_json", "good", good)
    dit = {k: v for k, v in GOOD.items() if k not in ("path", "prediction", "labels")}
    seed("model_json", "good-dit", json.dumps({**dit, "family": "dit", "guidance": {"channels": "all"}}).encode())
    seed("model_json", "labels", b"t-shirt, tee\ntrouser\nankle boot , boot\n")
    bad("empty", b"", "E_FORMAT", "not valid JSON")
    bad("truncated", good[:100], "E_FORMAT", "not valid JSON")
    bad("truncated-at-end", good[:-1], "E_FORMAT", "not valid JSON")
    bad("list", b"[]", "E_FORMAT", "not a JSON object")
    bad("two-documents", good + b"{}", "E_FORMAT", "not valid JSON")
    bad("zero-byte", good[:-1] + b"\0}", "E_FORMAT", "not valid JSON")
    bad("duplicate-key", good[:-1] + b', "step": 8}', "E_FORMAT", "duplicate")
    bad("deep", b"[" * 3000, "E_FORMAT", "nested deeper")
    bad("labels-not-closed", b'{"labels":[' + b"[]," * 1000, "E_FORMAT", "not valid JSON")
    field("unknown-field", "famliy", "sit", "E_FORMAT", "not known")
    field("unknown-field-inside", "architecture.heads", 3, "E_FORMAT", "not known")
    field("unknown-field-weights", "weights.url", "x", "E_FORMAT", "not known")
    bad("unknown-field-control", changed("a\nb", 1), "E_FORMAT [a?b]", "not known")
    field("format-2", "format", 2, "E_RANGE", "is 2")
    field("no-format", "format", DROP, "E_FORMAT", "missing")
    for path in ("family", "architecture", "path", "prediction", "guidance", "weights", "weights.file", "weights.sha256", "architecture.depth", "architecture.num_heads",
                 "guidance.channels"):
        field("no-" + path.replace(".", "-"), path, DROP, "E_FORMAT", "missing")
    field("family-unknown", "family", "unet", "E_UNSUPPORTED", "sit")
    field("family-number", "family", 3, "E_FORMAT", "string")
    field("family-long", "family", "s" * 100, "E_RANGE", "too long")
    bad("dit-with-path", changed("family", "dit"), "E_CONFLICT [path]", "does not apply")
    dit = {**dit, "family": "dit"}
    edm = {**dit, "family": "maskdit", "guidance": {"channels": "all"}}
    decoder = {"hidden_size": 48, "depth": 2, "num_heads": 3}
    zeros = "0" * 64

    def masked(name, path, value, status, *error):
        bad(name, changed(path, value, {**edm, "architecture": {**GOOD["architecture"], "decoder": decoder}}), f"{status} [{path}]", *error)

    seed("model_json", "good-maskdit", json.dumps({**edm, "architecture": {**GOOD["architecture"], "learn_sigma": False, "decoder": decoder}}).encode())
    seed("model_json", "good-repa", changed("time", "reversed"))
    seed("model_json", "good-diffusers", json.dumps({**dit, "compat": "diffusers",
                                                     "architecture": {**GOOD["architecture"], "block_embedders": True}}).encode())
    seed("model_json", "good-block", changed("architecture.block", "in-context"))
    seed("model_json", "good-latent", changed("latent", {"vae": {"file": "vae.safetensors", "sha256": zeros}, "scale": 0.18215}))
    seed("model_json", "good-statistics", changed("latent", {"mean": [0.5], "std": [2]}))
    seed("model_json", "good-loss-curve", changed("loss_curve", [[0, 2.5], [0.5, 0.7], [1, 1]]))
    bad("maskdit-with-prediction", changed("family", "maskdit", {**GOOD, "path": DROP}), "E_CONFLICT [prediction]", "does not apply")
    bad("maskdit-with-loss-curve", changed("loss_curve", [[0, 1], [1, 1]], edm), "E_CONFLICT [loss_curve]", "does not apply")
    field("block-unknown", "architecture.block", "adaLN", "E_UNSUPPORTED", "cross-attention")
    field("block-number", "architecture.block", 1, "E_FORMAT", "string")
    field("block-embedders-sit", "architecture.block_embedders", True, "E_CONFLICT", "does not apply")
    field("decoder-of-sit", "architecture.decoder", decoder, "E_CONFLICT", "does not apply")
    masked("decoder-number", "architecture.decoder", 8, "E_FORMAT", "object")
    masked("decoder-unknown-field", "architecture.decoder.width", 8, "E_FORMAT", "not known")
    masked("decoder-no-heads", "architecture.decoder.num_heads", DROP, "E_FORMAT", "missing")
    masked("decoder-depth-zero", "architecture.decoder.depth", 0, "E_RANGE", "is 0")
    masked("decoder-depth-huge", "architecture.decoder.depth", 5000, "E_RANGE", "1024")
    masked("decoder-heads-zero", "architecture.decoder.num_heads", 0, "E_RANGE")
    masked("decoder-heads-not-dividing", "architecture.decoder.num_heads", 5, "E_RANGE", "does not divide")
    masked("decoder-width-huge", "architecture.decoder.hidden_size", 1 << 24, "E_RANGE")
    masked("decoder-width-odd", "architecture.decoder.hidden_size", 50, "E_RANGE", "multiple of 4")
    bad("decoder-with-block", changed("architecture.block", "adaln", {**edm, "architecture": {**GOOD["architecture"], "decoder": decoder}}),
        "E_RANGE [architecture.decoder]", "adaln-zero")
    field("time-unknown", "time", "backward", "E_UNSUPPORTED", "reversed")
    field("time-number", "time", 1, "E_FORMAT", "string")
    bad("time-of-dit", changed("time", "reversed", dit), "E_CONFLICT [time]", "does not apply")
    field("compat-of-sit", "compat", "diffusers", "E_CONFLICT", "dit")
    bad("compat-unknown", changed("compat", "jax", dit), "E_UNSUPPORTED [compat]", "diffusers")
    field("latent-text", "latent", "sd", "E_FORMAT", "object")
    bad("latent-empty", changed("latent", {}), "E_FORMAT [latent.scale]", "missing")
    bad("latent-unknown-field", changed("latent", {"scale": 1, "shift": 0}), "E_FORMAT [latent.shift]", "not known")
    bad("latent-scale-zero", changed("latent", {"scale": 0}), "E_RANGE [latent.scale]")
    bad("latent-scale-text", changed("latent", {"scale": "0.18"}), "E_FORMAT [latent.scale]", "number")
    bad("latent-scale-and-mean", changed("latent", {"scale": 1, "mean": [0]}), "E_CONFLICT [latent.scale]", "exclude")
    bad("latent-no-std", changed("latent", {"mean": [0]}), "E_FORMAT [latent.std]", "missing")
    bad("latent-std-zero", changed("latent", {"mean": [0], "std": [0]}), "E_RANGE [latent.std]")
    bad("latent-mean-too-many", changed("latent", {"mean": [0, 0], "std": [1, 1]}), "E_CONFLICT [latent.mean]", "a channel")
    bad("latent-vae-text", changed("latent", {"scale": 1, "vae": "ema"}), "E_FORMAT [latent.vae]", "object")
    bad("latent-vae-no-sha", changed("latent", {"scale": 1, "vae": {"file": "v"}}), "E_FORMAT [latent.vae.sha256]", "missing")
    bad("latent-vae-parent", changed("latent", {"scale": 1, "vae": {"file": "../v", "sha256": zeros}}), "E_FORMAT [latent.vae.file]", "name of a file")
    field("loss-curve-number", "loss_curve", 1, "E_FORMAT", "pairs")
    field("loss-curve-short", "loss_curve", [[0, 1]], "E_FORMAT", "pairs")
    field("loss-curve-triple", "loss_curve", [[0, 1, 2], [1, 1, 2]], "E_FORMAT", "pairs")
    field("loss-curve-falling", "loss_curve", [[0.5, 1], [0.5, 1]], "E_RANGE")
    field("loss-curve-outside", "loss_curve", [[0, 1], [1.5, 1]], "E_RANGE", "outside")
    field("loss-curve-negative", "loss_curve", [[0, 1], [1, -1]], "E_RANGE")
    field("loss-curve-text", "loss_curve", [[0, "1"], [1, 1]], "E_FORMAT", "numbers")
    field("path-unknown", "path", "Linear", "E_UNSUPPORTED", "linear")
    field("prediction-unknown", "prediction", "v", "E_UNSUPPORTED", "velocity")
    field("depth-zero", "architecture.depth", 0, "E_RANGE")
    field("depth-huge", "architecture.depth", 1 << 40, "E_RANGE")
    field("depth-negative", "architecture.depth", -8, "E_RANGE")
    field("depth-real", "architecture.depth", 8.0, "E_FORMAT", "integer")
    field("depth-text", "architecture.depth", "8", "E_FORMAT", "integer")
    field("width-huge", "architecture.hidden_size", 1 << 24, "E_RANGE")
    field("width-odd", "architecture.hidden_size", 190, "E_RANGE", "multiple of 4")
    field("input-huge", "architecture.input_size", 8192, "E_RANGE", "2^31 activations")
    field("input-zero", "architecture.input_size", 0, "E_RANGE")
    bad("patch-not-dividing", changed("architecture.patch_size", 5), "E_RANGE [architecture.patch_size]", "does not divide")
    field("patch-zero", "architecture.patch_size", 0, "E_RANGE")
    field("heads-not-dividing", "architecture.num_heads", 5, "E_RANGE", "does not divide")
    field("heads-too-wide", "architecture.num_heads", 1, "E_RANGE", "128 wide")
    field("heads-zero", "architecture.num_heads", 0, "E_RANGE")
    field("channels-huge", "architecture.in_channels", 100000, "E_RANGE")
    field("classes-huge", "architecture.num_classes", 1 << 24, "E_RANGE", "label table")
    field("classes-beyond-32-bits", "architecture.num_classes", 1 << 33, "E_RANGE")
    bad("integer-beyond-64-bits", changed("architecture.depth", 1 << 80), "E_FORMAT", "not valid JSON")
    field("mlp-zero", "architecture.mlp_ratio", 0, "E_RANGE")
    field("mlp-huge", "architecture.mlp_ratio", 1e300, "E_RANGE")
    field("mlp-fraction", "architecture.mlp_ratio", 4.001, "E_RANGE", "whole number")
    field("mlp-text", "architecture.mlp_ratio", "4", "E_FORMAT", "number")
    field("dropout-number", "architecture.class_dropout", 1, "E_FORMAT", "true or false")
    field("guidance-zero", "guidance.channels", 0, "E_RANGE")
    field("guidance-word", "guidance.channels", "some", "E_FORMAT", "all")
    field("guidance-number", "guidance", 3, "E_FORMAT", "object")
    field("labels-too-few", "labels", ["a"], "E_CONFLICT", "names 1 classes")
    field("labels-number", "labels", [1, 2], "E_FORMAT")
    field("labels-text", "labels", "ab", "E_FORMAT", "array")
    field("labels-empty-name", "labels", ["a", ""], "E_FORMAT", "names")
    field("labels-no-name", "labels", ["a", []], "E_RANGE", "no name")
    field("labels-control", "labels", ["a", "b\n"], "E_FORMAT", "control")
    field("labels-long", "labels", ["a", "b" * 300], "E_FORMAT", "200 bytes")
    field("labels-many-names", "labels", ["a", ["b"] * 65], "E_RANGE", "more than 64")
    field("default-text", "default", "yes", "E_FORMAT", "true or false")
    field("step-negative", "step", -1, "E_RANGE")
    for name, value in {"parent": "../weights.safetensors", "absolute": "/etc/passwd", "inside": "a/b", "dots": "..", "dot": ".", "empty": "", "hidden": ".w",
                        "backslash": "..\\w", "newline": "w\n"}.items():
        field("file-" + name, "weights.file", value, "E_FORMAT", "name of a file")
    field("file-long", "weights.file", "w" * 300, "E_RANGE", "too long")
    field("sha-short", "weights.sha256", "00", "E_FORMAT", "64")
    field("sha-upper", "weights.sha256", "A" * 64, "E_FORMAT", "lower-case")
    field("sha-long", "weights.sha256", "0" * 65, "E_RANGE", "too long")


if __name__ == "__main__":
    for kind in ("safetensors", "pt", "model_json"):
        shutil.rmtree(f"{HERE}/{kind}", ignore_errors=True)
        shutil.rmtree(f"{CORPUS}/{kind}", ignore_errors=True)
    safetensors()
    pickles()
    model_json()
