"""What sparse attention costs a model, plan by plan, at the density that was measured.

Four kinds of rows (``kind``), each for a plan at a nominal density, all with the same blocks kept in any case:

* ``choice``: every layer is given what dense attention computes, and the plan chooses: share of the probability that it
  keeps (``recall``), the most that as many blocks could hold (``best``), relative error of the layer's output
  (``error``). Of the second half of the queries, where there is something to choose from.
* ``prefill``: windows in one pass, the loss of their second half against the dense model's, and KL.
* ``decode``: a dense prompt, then one token at a time, by the plan.
* ``retrieval``: pass keys, needles and keyed numbers in long contexts, asked for in the same pass (``prefill``) or
  token by token after a dense prompt (``decode``); teacher-forced exact answers.

Gates are trained first unless ``--gates`` names some or no plan asks for them. ``sink_local`` and ``random`` stand
beside every plan at its own density, with its own blocks (``matched``: the plan that they stand beside).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from attention_rows import COMMON, PREFILL, Bench, Setups, tolerated
from harness import arguments
from torch import Tensor

from rarefy.attention.call import Call
from rarefy.attention.estimators.low_bit import LowBitProducts
from rarefy.attention.plan import AttentionPlan
from rarefy.attention.reach import Reach
from rarefy.attention.selectors import TopK
from rarefy.contracts import AttentionRecipe, GatedRecipe
from rarefy.evaluation.long.material import Material
from rarefy.integrations.transformers.listening import listen
from rarefy.integrations.transformers.plan_setup import AttentionSetup, attention_recipe, prepared, shape_of
from rarefy.sources.texts import open_text

DECODE = ("oracle", "seer_attention", "untrained gate", "infllm_v2", "sparge", "quest_pages", "sink_local", "random")
SALE: tuple[dict[str, Any], ...] = ({"budget": 0.05}, {"budget": 0.05, "every": 1}, {"budget": 0.02}, {"budget": 0.1})
# Plans that find their density themselves.
MASS: dict[str, tuple[str, dict[str, Any]]] = {
    "seer_attention mass 0.9": ("seer_attention", {"mass": 0.9}),
    "seer_attention mass 0.95": ("seer_attention", {"mass": 0.95}),
    "xattention mass 0.95": ("xattention", {"mass": 0.95, "density": None}),
    "minference 30 columns, 800 diagonals": ("minference", {"vertical": 30, "slash": 800, "phases": "prefill"}),
}
RETRIEVAL = ("passkey", "needle", "kv_easy")


def share_for(density: float, recipe: AttentionRecipe, context: int) -> float:
    """The nominal density at which the best blocks of each row, with the forced blocks of ``recipe``, have that density
    when measured."""
    reach = Reach.last(context, context)
    blocks = reach.blocks(recipe.block_q, recipe.block_k)
    forced = recipe.forced(reach, blocks, 0, 1, 1)
    low, high = 0.0, 1.0
    for _ in range(20):
        share = (low + high) / 2
        keep = TopK(share).select(torch.zeros(blocks.some.shape), blocks.some, forced)
        low, high = (share, high) if float(keep.sum() / blocks.some.sum()) < density else (low, share)
    return max(high, 1e-4)


def train_gates(bench: Bench) -> None:
    """Gates from ``--gates``, or trained here and kept in ``--keep``; and untrained ones."""
    options = bench.options
    modules = prepared(bench.model)
    new = attention_recipe("seer_attention", {"truth": options.truth} if options.truth else {})
    assert isinstance(new, GatedRecipe)
    bench.untrained = {
        layer: {
            name: tensor
            for phase, gate in new.new_gates(shape_of(module, bench.model, len(modules))).items()
            for name, tensor in gate.tensors(phase).items()
        }
        for layer, module in modules.items()
    }
    if options.gates is not None or "seer_attention" not in options.plans:
        bench.params = options.gates
        return
    from rarefy.calibration.samples import open_samples
    from rarefy.integrations.transformers.plan_fitting import GateTrainer
    from rarefy.training.loop import Schedule

    begin = time.monotonic()
    samples = open_samples(
        options.train_text, bench.tokenizer, bench.model.config, options.steps, options.train_len or bench.context, 0
    )
    rows = torch.cat([batch["input_ids"] for batch in samples.batches])
    if options.train_sessions:
        # Texts alone teach little of questions whose answers lie far back.
        material = Material(bench.tokenizer, open_text(options.train_text, "calibration").text)
        asked = [
            bench.session(material, task, f"train {task} {number}", rows.shape[1])[0]
            for task in options.tasks
            for number in range(options.train_sessions)
        ]
        length = min(rows.shape[1], *(len(tokens) for tokens in asked))
        rows = torch.cat([rows[:, :length], torch.stack([tokens[-length:] for tokens in asked])])
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    trainer = GateTrainer("seer_attention", new, bench.model, rows[order], options.batch, 0)
    for place in range(len(rows)):  # half of the time to read, half to learn from what was read
        trainer.read(place)
        if time.monotonic() - begin > options.train_seconds / 2 or place not in trainer.lessons:
            trainer.rows = trainer.rows[: len(trainer.lessons)]
            break
    trainer.step(0)  # the first one is slow
    start = time.monotonic()
    for number in range(4):
        trainer.step(number)
    affordable = int(4 * (begin + options.train_seconds - start) / (time.monotonic() - start))
    losses = trainer.train(Schedule(steps=max(10, min(options.steps, affordable)), rate=options.rate))
    seconds = time.monotonic() - begin
    path = options.keep / f"{bench.name}-gates{options.truth or ''}.safetensors"
    options.keep.mkdir(parents=True, exist_ok=True)
    trainer.setup().save(path)
    bench.params = path
    part = max(1, len(losses) // 10)
    bench.row(
        "training", f"seer_attention, truth={new.truth}",
        loss_first=sum(losses[:part]) / part, loss_last=sum(losses[-part:]) / part, steps=len(losses),
        tokens=len(trainer.rows) * rows.shape[1], seconds=seconds,
        note=f"{len(trainer.rows)} x {rows.shape[1]} tokens of {samples.describe()} and questions",
    )  # fmt: skip


def sale_rows(bench: Bench, own: dict[str, Any]) -> Setups:
    """SALE at a budget, how well its thresholds keep it on held-out text, and the controls at the density it took."""
    from rarefy.attention.thresholds import head_errors

    base = {key: value for key, value in COMMON.items() if key not in ("local", "phases")}
    setup = bench.setup("sale", **{**base, "local": 5, "phases": "prefill"}, **own)
    modules = prepared(bench.model)
    plans = {
        layer: setup.plan(shape_of(module, bench.model, len(modules)), bench.model.device)
        for layer, module in modules.items()
    }
    errors: list[Tensor] = []
    tiles: dict[str, Tensor] = {}

    def hear(call: Call) -> None:
        plan = plans[call.layer]
        apart, whole = head_errors([plan], call)
        errors.append((apart[0] / whole).cpu())
        for name, count in tiles_in_few_bits(plan, plan.prepared(call)).items():
            tiles[name] = tiles.get(name, torch.zeros(3)) + count

    for window in bench.windows[: bench.options.looked]:
        listen(bench.model, window[None], hear)
    found = torch.cat(errors)
    job = "sale:" + ",".join(f"{name}={value:g}" for name, value in own.items())
    bench.row(
        "budget", job, budget=own["budget"], mean_error=float(found.mean()), worst_error=float(found.max()),
        within=float((found <= own["budget"]).float().mean()),
        within_half_more=float((found <= 1.5 * own["budget"]).float().mean()),
        heads=len(found), **{
            f"{name}_{what}": float(part / count[0])
            for name, count in tiles.items() for what, part in (("found", count[1]), ("as_many", count[2]))
        },
    )  # fmt: skip
    bench.choice(job, setup)
    return with_controls(bench, job, setup)


def tiles_in_few_bits(plan: AttentionPlan, call: Call) -> dict[str, Tensor]:
    """Of tiles that no policy forces: how many exact scores put above their head's threshold, how many of these scores
    in few bits do too, and how many those do at all; as they are, and without taking out means."""
    options = plan.estimator.options
    blocks = call.reach.blocks(plan.block_q, plan.block_k, call.query.device)
    forced = plan.policy.forced(call.reach, blocks, call.layer, call.mask_heads, call.heads)
    free = blocks.some & ~forced & (plan.selector.threshold > 0).to(forced.device).view(-1, 1, 1)
    exact, few, rough = (
        plan.selector.select(LowBitProducts(**{**options, **own}).scores(call, blocks), blocks.some, forced) & free
        for own in ({"num_bits": None}, {}, {"smooth": False})
    )
    return {
        name: torch.stack([exact.sum(), (exact & found).sum(), found.sum()]).cpu()
        for name, found in (("tiles", few), ("tiles_without_means", rough))
    }


def with_controls(bench: Bench, job: str, setup: AttentionSetup) -> Setups:
    """A plan that chooses its density itself, and the controls at that density."""
    with bench.using(setup), torch.inference_mode():
        bench.logits(bench.windows[0])
        density = setup.report.density()
    setups: Setups = {job: (setup, {})}
    if density >= 1:
        return setups
    share = share_for(density, setup.recipe, bench.context)
    blocks = {"block_q": setup.recipe.block_q, "block_k": setup.recipe.block_k, "local": setup.recipe.local}
    for control in ("oracle", "sparge", "sink_local", "random"):
        with tolerated(control):
            setups[f"{control} beside {job}"] = (bench.setup(control, **blocks, density=share), {"matched": job})
    return setups


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--model", default="demo", help="folder, hub id or 'demo'")
    parser.add_argument("--name", help="what the model is called in rows; default: its folder's name")
    parser.add_argument("--text", nargs="+", default=["demo"], help="held-out texts")
    parser.add_argument("--train-text", default="demo", help="text for gates and thresholds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--plans", nargs="+", default=[*PREFILL, *DECODE, "minference"], help="those to measure")
    parser.add_argument("--densities", nargs="+", type=float, default=[0.05, 0.1, 0.2])
    parser.add_argument("--windows", type=int, default=4, help="of each text")
    parser.add_argument("--looked", type=int, default=2, help="windows whose choices are examined")
    parser.add_argument("--decoded", type=int, default=4, help="windows whose end is decoded")
    parser.add_argument("--tasks", nargs="*", default=list(RETRIEVAL))
    parser.add_argument("--sessions", type=int, default=8, help="of each task, five questions each")
    parser.add_argument("--decoded-sessions", type=int, default=4, help="whose questions are decoded too")
    parser.add_argument("--train-sessions", type=int, default=16, help="of each task, among the texts for gates")
    parser.add_argument("--executor", default="auto")
    parser.add_argument("--gates", type=Path, help="trained gates")
    parser.add_argument("--keep", type=Path, default=Path("."), help="folder for gates that are trained here")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--truth", help="what gates learn of a block, if not the recipe's default")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--train-len", type=int, help="tokens of a training sequence; default: the context")
    parser.add_argument("--train-seconds", type=float, default=600)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing new after that many")
    parser.add_argument("--parts", nargs="+", default=["choice", "prefill", "sale", "mass", "decode", "retrieval"])
    options = parser.parse_args(argv)
    if options.quick:
        options.context, options.windows, options.looked, options.steps = min(1024, options.context), 1, 1, 30
        options.densities, options.sessions, options.decoded, options.decoded_sessions = options.densities[:1], 1, 1, 1
        options.train_sessions = 1
    bench = Bench(options)
    bench.attempt("training", lambda: train_gates(bench))
    found: dict[str, tuple[AttentionSetup, dict[str, Any]]] = {}
    for density in options.densities:
        for name in (name for name in PREFILL if name in options.plans):

            def add(name: str = name, density: float = density) -> None:
                told = f"{name}, truth={options.truth}" if options.truth and name == "seer_attention" else name
                found[f"{told} {density}"] = bench.setup(name, density=density), {"nominal": density}

            bench.attempt(name, add)
    if "prefill" in options.parts:
        bench.losses("prefill", dict(found))
    if "choice" in options.parts:
        for name, (setup, facts) in found.items():
            bench.attempt(
                f"choice {name}", lambda name=name, setup=setup, facts=facts: bench.choice(name, setup, **facts)
            )
    if "sale" in options.parts:
        for own in SALE[: 1 if options.quick else None]:

            def by_budget(own: dict[str, Any] = own) -> None:
                setups = sale_rows(bench, own)
                bench.losses("prefill", dict(setups))
                if "retrieval" in options.parts and own is SALE[0]:
                    bench.retrieval("prefill", setups, options.tasks, options.sessions)

            bench.attempt(f"sale {own}", by_budget)
    if "mass" in options.parts:
        asked_for = [(job, *own) for job, own in MASS.items() if own[0] in options.plans]
        for job, name, own in asked_for[: 1 if options.quick else None]:

            def by_mass(job: str = job, name: str = name, own: dict[str, Any] = own) -> None:
                bench.losses("prefill", with_controls(bench, job, bench.setup(name, **own)))

            bench.attempt(job, by_mass)
    middle = options.densities[len(options.densities) // 2]
    if "retrieval" in options.parts:
        chosen = {name: pair for name, pair in found.items() if name.endswith(f" {middle}")}
        with_dense: Setups = {"dense": (None, {}), **chosen}
        bench.attempt("retrieval", lambda: bench.retrieval("prefill", with_dense, options.tasks, options.sessions))
    decoding: Setups = {}
    for name in (name for name in DECODE if name in options.plans):

        def add_decoding(name: str = name) -> None:
            own: dict[str, Any] = {"phases": "decode", "density": middle}
            if name == "quest_pages":
                own |= {"block_k": 64, "dense_layers": ()}
            decoding[f"{name} {middle}"] = bench.setup(name, **own), {"nominal": middle}

        bench.attempt(name, add_decoding)
    if "decode" in options.parts:
        bench.attempt("decode", lambda: bench.losses("decode", dict(decoding)))
    if "retrieval" in options.parts and options.decoded_sessions:
        asked = options.tasks[:1]
        bench.attempt("retrieval", lambda: bench.retrieval("decode", decoding, asked, options.decoded_sessions))


if __name__ == "__main__":
    main()
