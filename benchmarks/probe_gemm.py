"""Probe: many forms of gemm.cu, checked and timed. probe_gemm.py OUT PART."""
import faulthandler, json, os, sys, time, traceback, functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace, asdict
import torch
sys.path.insert(0, "benchmarks")
from gpu_linear import JOBS, Weights, relative, Job
from graphs import graph_of, microseconds, bandwidth
from rarefy.formats.grids import *
from rarefy.kernels.cuda import program
from rarefy.kernels.cuda.program import Tuning

OUT, PARTS, LIMIT = sys.argv[1], sys.argv[2], float(sys.argv[3])
T0 = time.time()
faulthandler.dump_traceback_later(LIMIT + 2)
rows_out = []

def W(tiles, tokens, across, stages, depth=3, split=1, cluster=1, resc=False, turns=False, overlap=True):
    return Tuning(tiles, tokens // 8, across, 1, depth, stages, split, True, overlap, cluster, resc, False, turns)

def L(tiles, across, along, depth, spread=True, late=False, overlap=True):
    return Tuning(tiles, 1, across, along, depth, 0, 1, False, overlap, 1, False, spread, False, late)

def name_of(t):
    flags = "".join(f" {n}" for n in ("rescaled", "in_turns", "spread", "late") if getattr(t, n)) + ("" if t.overlap else " noPDL")
    if t.wide:
        return f"T{t.tiles} N{8*t.tokens} A{t.across} S{t.stages} d{t.depth} k{t.split} c{t.cluster}" + flags
    return f"linear T{t.tiles} {t.across}x{t.along} d{t.depth} s{t.stages}" + flags

def say(**row):
    rows_out.append(row)
    print(f"{time.time() - T0:5.1f}", row, flush=True)
    json.dump(rows_out, open(OUT, "w"))

def compile_all(code, tunings, half=False):
    def one(t):
        try:
            for name in ("gemm", "arrange") if t.wide else ("linear",):
                program.kernel(0, name, code, replace(t, overlap=False), half)
        except Exception as e:
            print("compile", t, str(e)[-300:], flush=True)
    with ThreadPoolExecutor(14) as pool:
        list(pool.map(one, tunings))

def trial(name, w, tokens, tunings, x=None):
    x = torch.randn(tokens, w.columns, device="cuda", dtype=torch.bfloat16) if x is None else x
    expected = w.product(x)
    for t in tunings:
        if time.time() - T0 > LIMIT:
            return
        row = dict(job=name, rows=w.rows, columns=w.columns, tokens=tokens,
                   t=name_of(t))
        try:
            calls, y = w.calls(t, x)
            calls[0]()
            torch.cuda.synchronize()
            row["err"] = float(f"{relative(y, expected):.2g}")
            if row["err"] < 1e-2:
                g = graph_of(calls)
                row["us"] = round(microseconds({"": (g, len(calls))}, 5)[""], 2)
                row["err2"] = float(f"{relative(calls[0].results[-1], expected):.2g}")
                del g
        except Exception as e:
            row["failure"] = str(e).splitlines()[0][:200]
            say(**row)
            if "CUDA" in row["failure"] and "compile" not in row["failure"]:
                raise
            continue
        say(**row)

VARIANTS = {
    64: [W(1, 64, 8, 6, 3), W(1, 64, 8, 6, 2), W(1, 64, 8, 6, 4), W(1, 64, 8, 4, 3), W(1, 64, 4, 4, 3), W(1, 64, 4, 6, 2), W(1, 64, 8, 6, 3, turns=True), W(1, 64, 12, 6, 2)],
    32: [W(1, 32, 8, 8, 3), W(1, 32, 8, 8, 2), W(1, 32, 8, 8, 4), W(1, 32, 8, 4, 3), W(1, 32, 4, 6, 3), W(1, 32, 4, 8, 4), W(1, 32, 8, 8, 3, turns=True), W(1, 32, 8, 8, 3, overlap=False), W(1, 32, 12, 8, 3)],
    128: [W(1, 128, 8, 5, 2), W(1, 128, 8, 5, 3), W(1, 128, 8, 5, 2, resc=True), W(1, 128, 8, 5, 3, resc=True), W(1, 128, 8, 5, 2, turns=True), W(1, 128, 8, 5, 3, resc=True, turns=True), W(1, 128, 8, 3, 2)],
    256: [W(1, 256, 8, 3, 2, resc=True), W(1, 256, 8, 3, 2, resc=True, turns=True), W(1, 128, 8, 5, 2), W(1, 128, 8, 5, 2, turns=True), W(1, 128, 8, 5, 3, resc=True, turns=True), W(1, 256, 8, 2, 2, resc=True, turns=True)],
    512: [W(1, 256, 8, 3, 2, resc=True), W(1, 256, 8, 3, 2, resc=True, turns=True), W(1, 128, 8, 5, 2, turns=True)],
    1024: [W(1, 256, 8, 3, 2, resc=True), W(1, 256, 8, 3, 2, resc=True, turns=True)],
    16: [W(1, 16, 8, 8, 3), W(1, 16, 4, 8, 3), Tuning(2, 2, 1, 4, 1), Tuning(2, 2, 1, 4, 1, overlap=True), Tuning(1, 2, 1, 8, 1, overlap=True)],
}
CLUSTERS = {
    64: [W(1, 64, 8, 6, 3, 1, 2), W(1, 64, 8, 6, 3, 1, 4)],
    32: [W(1, 32, 8, 8, 3, 1, 2)],
    128: [W(1, 128, 8, 5, 2, 1, 2), W(1, 128, 8, 5, 3, 1, 2, True, True)],
    256: [W(1, 256, 8, 3, 2, 1, 2, True, True), W(1, 256, 8, 3, 2, 1, 2, True), W(1, 128, 8, 5, 3, 1, 2, True, True)],
}

def main():
    torch.manual_seed(0)
    if "A" in PARTS:
        w = Weights(JOBS["W4"], 14336, 4096)
        compile_all(w.code, [t for v in VARIANTS.values() for t in v])
        print("compiled", time.time() - T0, torch.cuda.get_device_name(), "copy bytes/us", bandwidth(), flush=True)
        dense = [torch.randn(14336, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
        for tokens in VARIANTS:
            x = torch.randn(tokens, 4096, device="cuda", dtype=torch.bfloat16)
            us = microseconds({"": (graph_of([functools.partial(torch.nn.functional.linear, x, d) for d in dense]), 4)}, 9)[""]
            say(job="bf16", tokens=tokens, us=round(us, 2))
            trial("W4", w, tokens, VARIANTS[tokens], x)
        # the product alone, and the arranging alone
        for t in (W(1, 64, 8, 6), W(1, 32, 8, 8), W(1, 128, 8, 5)):
            x = torch.randn(8 * t.tokens, 4096, device="cuda", dtype=torch.bfloat16)
            calls, givens, keep = [], [], []
            for own in w.copies:
                y = torch.empty(x.shape[0], w.rows, device="cuda", dtype=x.dtype)
                work = program.workspace(w.code, t, w.rows, 4096, x.shape[0], x.device)
                given = program.arguments({**own, **work, "x": x, "y": y}, rows=w.rows, columns=4096, tokens=x.shape[0], stride=4096)
                keep += [y, work, given]; givens.append(given)
            c = replace(t, overlap=False)
            k = program.kernel(0, "gemm", w.code, c, False); ar = program.kernel(0, "arrange", w.code, c, False)
            for over in (True,):
                calls = [lambda g=g: k(program.grid(t, w.rows, g.tokens), t.threads, g, torch.cuda.current_stream().cuda_stream, over) for g in givens]
                us = microseconds({"": (graph_of(calls), len(calls))}, 5)[""]
                calls = [lambda g=g: ar(program.arranging(w.code, t, g), 128, g, torch.cuda.current_stream().cuda_stream, over) for g in givens]
                us2 = microseconds({"": (graph_of(calls), len(calls))}, 5)[""]
                say(job="alone", tokens=x.shape[0], overlap=over, gemm=round(us, 2), arrange=round(us2, 2))
        # dequantize, then the library
        y = torch.empty(14336, 4096, device="cuda", dtype=torch.bfloat16)
        for tokens in (1024,):
            x = torch.randn(tokens, 4096, device="cuda", dtype=torch.bfloat16)
            def both(own):
                given = program.arguments({**own, "y": y}, rows=14336, columns=4096)
                program.dequantize(w.code, given, False, x.device)
                return torch.nn.functional.linear(x, y)
            def only(own):
                given = program.arguments({**own, "y": y}, rows=14336, columns=4096)
                program.dequantize(w.code, given, False, x.device)
            for n, f in (("both", both), ("only", only)):
                calls = [functools.partial(f, own) for own in w.copies]
                say(job="dequantized " + n, tokens=tokens, us=round(microseconds({"": (graph_of(calls), len(calls))}, 5)[""], 2))
    if "B" in PARTS:
        w = Weights(JOBS["W4"], 14336, 4096)
        print("weights", time.time() - T0, flush=True)
        for tokens, v in CLUSTERS.items():
            compile_all(w.code, v)
            print("compiled", time.time() - T0, flush=True)
            trial("W4", w, tokens, v)
    if "D" in PARTS:
        for name in ("W8", "W3 + 0.45%", "W3", "W2", "LUT4", "LUT4 rows", "NF4 g64", "W4 zero", "SpQR", "binary"):
            w = Weights(JOBS[name], 14336, 4096)
            v = {64: [W(1, 64, 8, 4, 2), W(1, 64, 8, 4, 3)], 128: [W(1, 128, 8, 3, 2)], 32: [W(1, 32, 8, 4, 2)]}
            compile_all(w.code, [t for u in v.values() for t in u])
            for tokens, u in v.items():
                trial(name, w, tokens, u)
            del w
    if "C" in PARTS:
        for rows, columns in ((4096, 4096), (4096, 14336), (28672, 4096), (6144, 4096)):
            if time.time() - T0 > LIMIT:
                return
            w = Weights(JOBS["W4"], rows, columns)
            if rows == 28672:
                v = {32: [W(1, 32, 8, 8, 3)], 64: [W(1, 64, 8, 6, 3), W(1, 64, 8, 4, 3, turns=True)], 128: [W(1, 128, 8, 5, 2), W(1, 128, 8, 5, 3, resc=True, turns=True)]}
            else:
                v = {32: [W(1, 32, 8, 8, 3, k) for k in (2, 4)] + [W(1, 32, 4, 8, 3, k) for k in (1, 2, 4)],
                     64: [W(1, 64, 8, 6, 3, k) for k in (2, 4)] + [W(1, 64, 4, 4, 3, k) for k in (1, 2, 4)],
                     128: [W(1, 128, 8, 5, 2, k) for k in (2, 4)] + [W(1, 128, 4, 5, 2, k) for k in (2, 4)] + [W(1, 64, 8, 6, 3, k) for k in (2, 4)] + [W(1, 64, 4, 4, 3, 2)]}
            compile_all(w.code, [t for u in v.values() for t in u])
            dense = [torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) for _ in range(5)]
            for tokens, u in v.items():
                x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
                us = microseconds({"": (graph_of([functools.partial(torch.nn.functional.linear, x, d) for d in dense]), 5)}, 9)[""]
                say(job="bf16", rows=rows, columns=columns, tokens=tokens, us=round(us, 2))
                trial("W4", w, tokens, u, x)
    if "E" in PARTS:
        def three(*shape, spread=True):
            return [L(*shape, spread), L(*shape, spread, late=True), L(*shape, spread, overlap=False)]
        jobs = {
            "W2": three(4, 1, 8, 1) + three(2, 1, 8, 2) + [L(2, 1, 8, 1, late=True), L(4, 1, 4, 2, late=True), L(2, 2, 4, 2, late=True), L(1, 1, 8, 4, late=True), L(2, 1, 4, 2, late=True), L(4, 1, 8, 2, late=True)],
            "binary": three(4, 1, 4, 2) + three(2, 2, 4, 2) + [L(2, 1, 8, 2, late=True), L(4, 1, 8, 1, late=True), L(2, 1, 4, 2, late=True), L(4, 2, 4, 1, late=True), L(4, 1, 4, 4, late=True), L(2, 1, 8, 1, late=True)],
            "W3 + 0.45%": three(2, 2, 4, 1) + three(1, 1, 8, 1) + [L(2, 1, 8, 1, late=True), L(2, 1, 4, 1, late=True)],
            "W3": three(2, 2, 4, 1) + three(1, 1, 8, 1) + [L(2, 1, 8, 1, late=True), L(2, 2, 4, 1, False), L(2, 1, 4, 1, late=True)],
            "SpQR": three(2, 2, 4, 1) + [L(2, 1, 8, 1, late=True), L(1, 2, 8, 1, late=True), L(1, 2, 4, 1, late=True)],
            "W4": three(1, 1, 8, 2) + three(2, 1, 8, 1) + [L(2, 1, 4, 2, late=True), L(4, 1, 8, 1, late=True)],
            "W8": three(1, 1, 8, 2) + [L(1, 1, 4, 2, late=True), L(2, 1, 8, 1, late=True)],
        }
        for name, tunings in jobs.items():
            if time.time() - T0 > LIMIT:
                return
            w = Weights(JOBS[name], 14336, 4096)
            compile_all(w.code, tunings)
            trial(name, w, 1, tunings)
            del w

if __name__ == "__main__":
    try:
        main()
    except Exception:
        traceback.print_exc()
    print("end", time.time() - T0, flush=True)
    os._exit(0)
