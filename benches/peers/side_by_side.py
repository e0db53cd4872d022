"""Measures ours and the Python tools by turns, and writes the tables into BENCHMARKS.md.

    python3 benches/peers/side_by_side.py --model SmolLM2-135M-Instruct.Q4_1.gguf

Makes what it needs under target/peers: an environment for those that agree with each other
(requirements.txt), one for those that do not agree with them (requirements-models.txt), one for
llama.cpp, which pip compiles (requirements-llama.txt), and our programs in the release profile. Every measurement is a process of its own, ours and theirs in turn,
as many rounds as are asked for; all of them are kept in target/peers/measurements.jsonl as they are
made, and a run that was interrupted goes on from there. Only Python's own library is needed here.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
ENVIRONMENTS = ["requirements", "requirements-models", "requirements-llama"]
KINDS = ["topk", "batchtopk", "jumprelu", "gated", "standard"]
# Those that keep a number of latents, whatever their weights.
SELECTING = ["topk", "batchtopk"]
SIZES = [4608, 18432]
N_AGREED_STEPS = 200
BEGIN, END = "<!-- side by side: begin -->", "<!-- side by side: end -->"

ABOUT = """Tokens a second unless it says otherwise. The limit of a training step is the product of its
encoder alone, as fast as the same tool takes it in the same process; of a pass, its products; of
decoding, reading the weights once. `ours : it` above 1 is in our favour."""

# What a line of a table is about, and in what it is measured: more is better, or less.
MORE, LESS = 1, -1


class Tool:
    def __init__(self, name, command, rename=None):
        self.name, self.command, self.rename = name, command, rename or {}


class Part:
    """Tools that measure the same, each of which prints JSON lines."""

    def __init__(self, name, tools, metric, direction, whats):
        self.name, self.tools = name, tools
        self.metric, self.direction = metric, direction
        # Names of lines with what they mean; none if a tool prints one line without a name.
        self.whats = whats


def run(command, **more):
    """What a process prints, line by line, if it is JSON."""
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        # As our programs set them for themselves.
        "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "30000000000",
    }
    done = subprocess.run(
        [str(part) for part in command], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\nfailed:\n{done.stderr[-3000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def prepare(folder):
    """The environments and our programs."""
    subprocess.run(["cargo", "build", "--release", "-p", "benches"], cwd=ROOT, check=True)
    for name in ENVIRONMENTS:
        python = folder / name / "bin" / "python"
        wanted = (HERE / f"{name}.txt").read_text()
        made = folder / name / "made-of.txt"
        if made.is_file() and made.read_text() == wanted:
            continue
        print(f"making {python.parent.parent}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder / name], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "-r", HERE / f"{name}.txt"], check=True)
        made.write_text(wanted)


def parts(options, ours, python, python_models, python_llama):
    step = HERE / "sae_step.py"
    for kind in KINDS:
        for d_sae in SIZES:
            peers = ["sae-lens", "dictionary-learning"]
            peers += ["sparsify", "by-hand"] if kind == "topk" else []
            arguments = ["--kind", kind, "--d-sae", d_sae, "--steps", options.steps]
            tools = [Tool("ours", [ours, "sae-step", *arguments])]
            if kind not in SELECTING:
                # Theirs begin with half of all latents active, ours with as many as are asked for.
                half = [*arguments, "--k", d_sae // 2]
                tools.append(Tool("ours, half active", [ours, "sae-step", *half]))
            tools += [Tool(peer, [python, step, "--library", peer, *arguments]) for peer in peers]
            name = f"training step, {kind}, {d_sae:,} latents"
            yield Part(name, tools, "tokens_per_s", MORE, {None: name})

    model, threads = ["--model", options.model], ["--threads", os.cpu_count()]
    passes = HERE / "model.py"
    whats = {
        "load": "load the model, seconds",
        "harvest_l15": "residual stream after block 15",
        "forward_logits": "all logits",
        "decode_f32": "decode, f32",
        "decode_bf16": "decode, weights in bf16",
        "decode_vector": "decode with a vector",
        "decode_clamp": "decode with a TopK latent clamped",
    }
    steered = {"add": "decode_vector", "clamp_topk_exact": "decode_clamp"}
    only = [f"--only={name}" for name in whats if name not in steered.values()]
    tools = [
        Tool("ours", [ours, "model", *model, *only]),
        Tool("ours", [ours, "steering", *model, "--only", ",".join(steered)], steered),
        Tool("transformers", [python, passes, *model, *threads]),
        Tool("transformer-lens",
             [python_models, passes, "--library", "transformer-lens", *model, *threads]),
        Tool("nnsight", [python_models, passes, "--library", "nnsight", *model, *threads]),
        Tool("llama.cpp", [python_llama, HERE / "llama.py", *model, *threads]),
    ]
    yield Part("SmolLM2-135M, [8, 128] tokens; decoding, one conversation", tools,
               "tokens_per_s", MORE, whats)

    whats = {
        "attribute": "from the tokens",
        "attribute_from_kept": "from the residual stream kept",
    }
    tools = [
        Tool("ours", [ours, "attribution", *model]),
        Tool("torch by hand", [python, HERE / "attribution.py", *model, *threads]),
    ]
    yield Part("gradient × activation of 4,608 latents over [8, 128] tokens, seconds", tools,
               "seconds", LESS, whats)


def measure(options, kept, keep, all_parts):
    for part in all_parts:
        for round_idx in range(options.rounds):
            for tool in part.tools:
                key = [part.name, tool.name, " ".join(map(str, tool.command[1:])), round_idx]
                if any(line["key"] == key for line in kept):
                    continue
                start = time.monotonic()
                lines = run(tool.command)
                keep({"key": key, "lines": lines})
                print(f"{part.name}: {tool.name}, {time.monotonic() - start:.0f} s", flush=True)


def found(kept, part, tool):
    """Numbers of a tool by what they are about, one for each round."""
    numbers = {}
    for line in kept:
        name, tool_name, command, _ = line["key"]
        if name != part.name or tool_name != tool:
            continue
        rename = next((t.rename for t in part.tools
                       if " ".join(map(str, t.command[1:])) == command), {})
        for measured in line["lines"]:
            what = measured.get("name") if None not in part.whats else None
            what = rename.get(what, what)
            if what in part.whats:
                numbers.setdefault(what, []).append(measured)
    return numbers


def spread(values):
    digits = 0 if statistics.median(values) >= 100 else 1 if statistics.median(values) >= 10 else 2
    show = lambda value: f"{value:,.{digits}f}"
    if len(values) == 1:
        return show(values[0])
    return f"{show(statistics.median(values))} ({show(min(values))} – {show(max(values))})"


def table(kept, part):
    # For a training step there is one thing to measure, and more to say of it.
    is_step = None in part.whats
    lines = [f"**{part.name}**", "",
             f"| {'active' if is_step else ''} | tool | median (range) | of the limit | peak MB | ours : it |",
             "|---|---|---|---|---|---|"]
    names = list(dict.fromkeys(tool.name for tool in part.tools))
    by_tool = {name: found(kept, part, name) for name in names}
    for what, meaning in part.whats.items():
        for name in names:
            measured = by_tool[name].get(what)
            if not measured:
                continue
            metric = "seconds" if "seconds" in measured[0] else part.metric
            direction = LESS if metric == "seconds" else part.direction
            values = [line[metric] for line in measured]
            of_limit = [share(line) for line in measured if share(line) is not None]
            peaks = [line["peak_rss_mb"] for line in measured if "peak_rss_mb" in line]
            # Of ours, those that do as much.
            own = by_tool.get("ours, half active", by_tool["ours"]).get(what)
            ratio = ""
            if own and not name.startswith("ours"):
                ours = statistics.median(line[metric] for line in own)
                theirs = statistics.median(values)
                ratio = f"{(ours / theirs) ** direction:.2f} ×"
            about = f"{statistics.median(line['l0'] for line in measured):,.0f}" if is_step else meaning
            lines.append(" | ".join([
                f"| {about}", name, spread(values),
                f"{100 * statistics.median(of_limit):.0f} %" if of_limit else "",
                f"{statistics.median(peaks):,.0f}" if peaks else "", f"{ratio} |"]))
    return "\n".join(lines)


def share(line):
    """How near it is to what the machine can do, by the limit measured in the same process."""
    if "of_encoder" in line:
        return 1 / line["of_encoder"]
    return line.get("limit_fraction", line.get("of_products"))


def agreement(folder, ours, python):
    """Losses from the same weights on the same batches."""
    lines = ["**Loss after 200 steps from the same weights on the same batches**", "",
             "| kind | ours | SAELens | largest difference in any step |", "|---|---|---|---|"]
    for kind in KINDS:
        start = folder / f"start-{kind}.safetensors"
        sizes = ["--k", 32, "--steps", N_AGREED_STEPS]
        (theirs,) = run([python, HERE / "sae_step.py", "--agree", start, "--kind", kind,
                         "--batch", 512, "--d-in", 256, "--d-sae", 2048, *sizes])
        (own,) = run([ours, "agree", start, "--kind", kind, *sizes])
        worst = max(abs(a - b) / b for a, b in zip(own["losses"], theirs["losses"], strict=True))
        if worst > 0.01:
            sys.exit(f"{kind}: losses are {100 * worst:.1f} % apart: somebody does something else")
        lines.append(f"| {kind} | {own['losses'][-1]:.3f} | {theirs['losses'][-1]:.3f} "
                     f"| {100 * worst:.3f} % |")
    return "\n".join(lines)


def to_begin_with(folder, ours, python, python_models, python_llama):
    """Size on disk and the time until a program or a library is there."""
    def seconds(command):
        times = []
        for _ in range(5):
            start = time.monotonic()
            subprocess.run([str(part) for part in command], check=True, capture_output=True, cwd=ROOT)
            times.append(time.monotonic() - start)
        return statistics.median(times[1:])

    def size(path):
        paths = path.rglob("*") if path.is_dir() else [path]
        return sum(p.stat().st_blocks * 512 for p in paths if p.is_file() and not p.is_symlink()) / 1e6

    def row(name, path, command):
        return f"| {name} | {size(path):,.0f} | {seconds(command):.2f} |"

    imports = lambda python, library: [python, "-c", f"import {library}"]
    return "\n".join([
        "**To begin with**", "", "| | on disk, MB | until it is there, s |", "|---|---|---|",
        row("ours: `benches`, which links every crate", ours, [ours, "--help"]),
        row("SAELens", folder / "requirements", imports(python, "sae_lens")),
        row("TransformerLens", folder / "requirements-models", imports(python_models, "transformer_lens")),
        row("nnsight", folder / "requirements-models", imports(python_models, "nnsight")),
        row("llama.cpp", folder / "requirements-llama", imports(python_llama, "llama_cpp")),
    ])


def machine():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    wide = any(" avx512f " in f"{line} " for line in lines if line.startswith("flags"))
    return f"{os.cpu_count()} threads of {names[0]}, {'AVX-512' if wide else 'AVX2'}"


def products(kept):
    """The pace of everybody's own products, which the limits of training steps are."""
    paces = {"ours": [], "torch": []}
    for line in kept:
        whose = "ours" if line["key"][1].startswith("ours") else "torch"
        paces[whose] += [found["gemm_gflops"] for found in line["lines"] if "of_encoder" in found]
    return " and ".join(f"{statistics.median(paces[whose]):,.0f} GFLOP/s {how}" for whose, how in
                        [("ours", "here"), ("torch", "in torch")])


def write(text):
    path = ROOT / "BENCHMARKS.md"
    page = path.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="SmolLM2-135M-Instruct as a GGUF file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="training steps in a round")
    parser.add_argument("--anew", action="store_true", help="forget what was measured before")
    parser.add_argument("--only", metavar="WORD", help="the parts with this in their name alone")
    options = parser.parse_args()
    options.model = options.model.resolve()
    folder = ROOT / "target" / "peers"
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder)
    ours = ROOT / "target" / "release" / "benches"
    pythons = [folder / name / "bin" / "python" for name in ENVIRONMENTS]
    path = folder / "measurements.jsonl"
    if options.anew:
        path.unlink(missing_ok=True)
    kept = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def keep(line):
        kept.append(line)
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    all_parts = [part for part in parts(options, ours, *pythons)
                 if not options.only or options.only in part.name]
    measure(options, kept, keep, all_parts)
    tables = [table(kept, part) for part in all_parts]
    if not options.only:
        tables.insert(0, f"Products of an encoder: {products(kept)}, the medians of all training steps.")
        tables.append(agreement(folder, ours, pythons[0]))
        tables.append(to_begin_with(folder, ours, *pythons))
    text = "\n\n".join([f"On {machine()}, {options.rounds} rounds.", ABOUT, *tables])
    print(text)
    if not options.only:
        write(text)


if __name__ == "__main__":
    main()
