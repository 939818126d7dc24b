"""How well the guard tells strangers: its ROC on the reference model, for the families of heads.toml.

    python recipes/study/guard.py

writes guard.json, guard.md and guard-roc.svg beside this file. The scenes of training/scenes.py, worded by the template
and in other words, are prompts of which it is known whether they are of a family.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
MODELS = HERE.parent / "models"
sys.path.insert(0, str(MODELS / "training"))

from heads.answers import Interval, wilson  # noqa: E402
from heads.plots import banded, figure  # noqa: E402
from heads.recipe import read_study  # noqa: E402
from scenes import Scene, caption, sample_scene  # noqa: E402
from scipy.stats import mannwhitneyu  # noqa: E402

from slipcast.progress import silent  # noqa: E402
from slipcast.run import guard as runtime_guard  # noqa: E402
from slipcast.run.guard import embed, nearness  # noqa: E402
from slipcast.run.tokenizer import PromptTokenizer  # noqa: E402
from slipcast_compiler.export.component import export_component  # noqa: E402
from slipcast_compiler.export.guard import choose_threshold, left_out  # noqa: E402
from slipcast_compiler.export.prompts import encode  # noqa: E402
from slipcast_compiler.host.cache import Cache  # noqa: E402
from slipcast_compiler.plan import Plan, make_plan  # noqa: E402
from slipcast_compiler.recipe.recipe import Recipe  # noqa: E402
from slipcast_compiler.recipe.targets import TargetTable  # noqa: E402

SEED, MOST, RESAMPLES, FALSE_ALARMS = 2026, 200, 2000, 0.05
GRID = [round(i / 20, 2) for i in range(21)]  # shares of the family that are taken for strangers
SETS = {
    "held_out": "held-out prompts of the family",
    "paraphrases": "scenes of the family in other words",
    "near": "one thing that is not of the family, in its words",
    "two": "two things, in the family's words",
    "other_words": "scenes out of the family in other words",
    "foreign": "nothing that the model knows",
}
STRANGERS = ("near", "two", "other_words")
FOREIGN = (
    "an astronaut rides a horse on mars",
    "portrait of an old fisherman, oil painting",
    "a bowl of soup with noodles",
    "city skyline at night, rain, neon",
    "a cat asleep on a sofa",
    "mountains in fog, wide shot, 35mm",
    "a red sports car on a coastal road",
    "an isometric room with plants",
    "two children fly a kite",
    "a castle made of glass",
    "close-up of a bee on a sunflower",
    "a logo for a coffee shop",
)


def inside(family: str, scene: Scene) -> bool:
    """Whether a scene is one that the family's template can say."""
    thing = scene.things[0]
    if len(scene.things) > 1 or family == "wide":
        return len(scene.things) == 1
    shapes = {"narrow": ("circle",), "medium": ("circle", "square", "star")}[family]
    return thing.shape in shapes and thing.size != "medium" and thing.texture == "plain"


def prompt_sets(name: str, plan: Plan) -> dict[str, list[str]]:
    """Different prompts of each kind, none of them of the family's list unless held out."""
    family, rng = plan.family, np.random.default_rng(SEED)
    assert family
    scenes = [sample_scene(rng) for _ in range(20_000)]
    own, others = ([s for s in scenes if inside(name, s) == wanted] for wanted in (True, False))
    members = {*family.calibration, *family.held_out}

    def take(prompts: list[str]) -> list[str]:
        return [prompt for prompt in dict.fromkeys(prompts) if prompt not in members][:MOST]

    return {
        "held_out": list(family.held_out[:MOST]),
        "paraphrases": take([caption(scene, rng) for scene in own]),
        "near": take([caption(scene) for scene in others if len(scene.things) == 1]),
        "two": take([caption(scene) for scene in others if len(scene.things) == 2]),
        "other_words": take([caption(scene, rng) for scene in others]),
        "foreign": list(FOREIGN),
    }


# --- distances -------------------------------------------------------------------------------------------------------


def in_bf16(plan: Plan, prompts: list[str]) -> Any:
    """Tokens, and the encoder's output where weights and arithmetic are bf16, as a target of that precision may be."""
    import torch
    from transformers import CLIPTextModel

    tokenizer = PromptTokenizer(MODELS / "shapes/tokenizer/tokenizer.json", plan.original.sizes["text_length"], 655)
    encoder = CLIPTextModel.from_pretrained(MODELS / "shapes/text_encoder", dtype=torch.bfloat16).eval()
    ids = tokenizer(prompts)
    with torch.no_grad():
        return ids, np.concatenate([encoder(torch.tensor(row[None]))[0].float().numpy() for row in ids])


def measure(name: str, plan: Plan, cache: Cache) -> dict[str, Any]:
    """Threshold, and distances of all prompts: as the runtime has them, in bf16, and by other ways to embed."""
    exported = {"text_encoder": export_component(plan.original, "text_encoder", cache)}
    family, sets = plan.family, prompt_sets(name, plan)
    assert family
    special = np.array([654, 655])
    kinds = [*(key for key, prompts in sets.items() for _ in prompts)]
    asked = [prompt for prompts in sets.values() for prompt in prompts]
    ids, hidden = encode(plan.original, [*family.calibration, *asked], exported, silent)
    context, count = hidden["encoder_hidden_states"], len(family.calibration)
    words = embed(ids, context, special)
    first_end = (ids == special[1]).argmax(axis=1)
    ends = embed(ids[:, :1], context[np.arange(len(ids)), first_end][:, None], special)
    low = embed(*in_bf16(plan, asked), special)

    def split(distances: list[float]) -> dict[str, list[float]]:
        return {key: [d for d, kind in zip(distances, kinds, strict=True) if kind == key] for key in sets}

    ways = {}
    usual = runtime_guard.NEIGHBOURS
    for title, embeddings, neighbours in (
        ("mean over words, 1 nearest", words, 1),
        ("mean over words, 3 nearest", words, 3),
        ("mean over words, 10 nearest", words, 10),
        ("end token, 3 nearest", ends, 3),
    ):
        runtime_guard.NEIGHBOURS = neighbours
        distances = split([nearness(embeddings[:count], one) for one in embeddings[count:]])
        ways[title] = rates(distances, choose_threshold(left_out(embeddings[:count]), FALSE_ALARMS))
    runtime_guard.NEIGHBOURS = usual
    threshold = choose_threshold(left_out(words[:count]), FALSE_ALARMS)
    return {
        "calibration": count,
        "threshold": threshold,
        "prompts": sets,
        "ways": ways,
        "distances": split([nearness(words[:count], one) for one in words[count:]]),
        "distances_bf16": split([nearness(words[:count], one) for one in low]),
    }


# --- what they say ---------------------------------------------------------------------------------------------------


def auc(family: Any, strangers: Any) -> float:
    """The chance that a stranger is farther than a prompt of the family; half of it where both are as far."""
    return float(mannwhitneyu(strangers, family, method="asymptotic").statistic / len(strangers) / len(family))


def found(family: Any, strangers: Any) -> Any:
    """The share of strangers that is told at each of GRID."""
    return np.array([(strangers > np.quantile(family, 1 - share, method="higher")).mean() for share in GRID])


def resampled(statistic: Any, family: list[float], strangers: list[float]) -> Any:
    """[value, low, high] of a statistic of both, with 95 % bootstrap intervals over prompts."""
    rng, both = np.random.default_rng(SEED), (np.array(family), np.array(strangers))
    draws = [statistic(*(rng.choice(each, len(each)) for each in both)) for _ in range(RESAMPLES)]
    return np.stack([statistic(*both), *np.quantile(draws, [0.025, 0.975], axis=0)], axis=-1)


def rates(distances: dict[str, list[float]], threshold: float) -> dict[str, Any]:
    """Alarms by set, and the AUCs of both kinds of the family's prompts against all strangers."""
    strangers = [d for key in STRANGERS for d in distances[key]]
    alarms = {key: (sum(d > threshold for d in each), len(each)) for key, each in distances.items()}
    return {"alarms": alarms, "auc": {key: auc(distances[key], strangers) for key in ("held_out", "paraphrases")}}


def draw(families: dict[str, Any]) -> str:
    """The ROC, a panel for each family."""
    panels = {}
    for name, measured in families.items():
        strangers = [d for key in STRANGERS for d in measured["distances"][key]]
        panels[name] = []
        for key, title in (("held_out", "held-out prompts against strangers"), ("paraphrases", "other words")):
            curve = resampled(found, measured["distances"][key], strangers)
            points: list[tuple[float, Interval]] = [
                (x, {"value": v, "low": low, "high": high}) for x, (v, low, high) in zip(GRID, curve, strict=True)
            ]
            panels[name].append(banded(title, points))
    marked = [0.0, 0.25, 0.5, 0.75, 1.0]
    return figure("Strangers that are told", panels, lambda v: f"{v:.0%}", "of the family taken for strangers", marked)


def share(alarms: tuple[int, int]) -> str:
    """A cell of the table."""
    hits, count = alarms
    if not count:
        return "none"
    return "{value:.0%} ({low:.0%} to {high:.0%})".format(**wilson(hits, count))


def render(families: dict[str, Any]) -> str:
    """The page."""
    names = list(families)
    told = {name: rates(each["distances"], each["threshold"]) for name, each in families.items()}
    rounded = {name: rates(each["distances_bf16"], each["threshold"]) for name, each in families.items()}
    shift = max(
        abs(a - b) / each["threshold"]
        for each in families.values()
        for key in SETS
        for a, b in zip(each["distances"][key], each["distances_bf16"][key], strict=True)
    )

    def table(head: str, rows: dict[str, list[str]]) -> str:
        lines = [f"| {head} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
        return "\n".join([*lines, *(f"| {key} | {' | '.join(cells)} |" for key, cells in rows.items())])

    def areas(key: str) -> list[str]:
        cells = []
        for each in families.values():
            strangers = [d for one in STRANGERS for d in each["distances"][one]]
            value, low, high = resampled(auc, each["distances"][key], strangers)
            cells.append(f"{value:.3f} ({low:.3f} to {high:.3f})")
        return cells

    def alarms_of(found: dict[str, Any]) -> dict[str, list[str]]:
        return {title: [share(found[name]["alarms"][key]) for name in names] for key, title in SETS.items()}

    ways = {
        f"{way}: AUC, other words taken for strangers, strangers told": [
            f"{w['auc']['paraphrases']:.3f}, {w['alarms']['paraphrases'][0] / w['alarms']['paraphrases'][1]:.0%}, "
            f"{sum(w['alarms'][k][0] for k in STRANGERS) / sum(w['alarms'][k][1] for k in STRANGERS):.1%}"
            for w in (families[name]["ways"][way] for name in names)
        ]
        for way in next(iter(families.values()))["ways"]
    }
    sizes = ", ".join(f"{name} {each['calibration']}" for name, each in families.items())
    # What is said in words is said of the figures, whatever they are.
    worst = max(told[name]["alarms"]["paraphrases"][0] / told[name]["alarms"]["paraphrases"][1] for name in names)
    missed = sum(told[n]["alarms"][k][1] - told[n]["alarms"][k][0] for n in names for k in STRANGERS)
    count = sum(told[n]["alarms"][k][1] for n in names for k in STRANGERS)
    return f"""# The guard: does it tell strangers?

This page is made by `python recipes/study/guard.py`; distances of all prompts are in [guard.json](guard.json).
Reference model; families of [heads.toml](heads.toml) with all their calibration prompts ({sizes}); thresholds for
{FALSE_ALARMS:.0%} false alarms, from calibration prompts alone. Scenes in other words come from the generator of the
training captions ("a picture of a big red disc on white"), and none is in a family's list. Intervals are of 95 %.

**In short.** {missed} of {count} strangers were taken for the family. But the guard tells *wording* as well as
*meaning*: up to {worst:.0%} of prompts that mean what the family means, in other words, are taken for strangers too.
They are nearer than strangers are, as the areas below say: the threshold, which knows the family's own wording alone,
is what is strict. Where users word prompts freely, give the family their wordings, or choose `warn` or `fallback`.

![ROC](guard-roc.svg)

## Taken for strangers, at the threshold

{table("prompts", alarms_of(told))}

## Area under the ROC, against all strangers

"Strangers" are the three sets of scenes out of the family (the wide family has all scenes of one thing).

{table("", {"held-out prompts": areas("held_out"), "other words": areas("paraphrases")})}

## With the text encoder in bf16

The threshold is measured in fp32. Where weights and arithmetic of the encoder are rounded to bf16, no distance changes
by more than {shift:.1%} of the threshold:

{table("prompts", alarms_of(rounded))}

## Other distances that were tried

{table("", ways)}
"""


def main() -> None:
    """Measure and write."""
    study = read_study(HERE / "heads.toml")
    cache = Cache(HERE.parents[1] / "artifacts" / "cache")
    families = {}
    for name, table in study.families.items():
        recipe = Recipe(name=name, model=study.model, family=table, targets=(TargetTable(engine="onnxruntime"),))
        families[name] = measure(name, make_plan(recipe, HERE), cache)
    document = {"command": "python recipes/study/guard.py", "false_alarms": FALSE_ALARMS, "families": families}
    rounded = json.loads(json.dumps(document), parse_float=lambda text: round(float(text), 6))
    (HERE / "guard.json").write_text(json.dumps(rounded, indent=None, separators=(",", ":")) + "\n", "utf-8")
    (HERE / "guard-roc.svg").write_text(draw(families), "utf-8")
    (HERE / "guard.md").write_text(render(families), "utf-8")


if __name__ == "__main__":
    main()
