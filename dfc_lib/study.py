"""What a notebook opens first: the models, prompts and crosscoders of a profile, and a way to ask.

>>> study = Study.open("toy")
>>> dfcs = study.crosscoders(["last tied"], seeds=[0, 1])  # by (recipe, seed)
>>> cells = {("clean",): Clean()} | {
...     ("steered", seed, alpha): Steer(Codec(dfc), (17,), alpha)
...     for (_, seed), dfc in dfcs.items() for alpha in (2.0, 4.0)
... }
>>> frame = study.run(cells, study.calls("evaluation"), levels=("cell", "seed", "alpha"))

Everything that takes long is kept in the profile's build folder under a name that says what it was
made from, so asking twice costs nothing and a killed run goes on.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfc_lib import paths, profiles, store
from dfc_lib.profiles import Profile

if TYPE_CHECKING:
    from collections.abc import Hashable

    import pandas as pd

    from dfc_lib.crosscoder.model import Crosscoder
    from dfc_lib.crosscoder.recipes import Recipe
    from dfc_lib.crosscoder.training import Job
    from dfc_lib.data.activations import Activations
    from dfc_lib.data.pair import Pair
    from dfc_lib.data.prompts import Record
    from dfc_lib.steering.interventions import Intervention


@dataclass(frozen=True, eq=False)
class Study:
    """A profile with its models, prompts, caches and crosscoders, each loaded when first asked for.

    Attributes:
        profile: sets the sizes and budgets.
        sources: the models of :attr:`pair` by name; default: the profile's A and B. Another pair of
            the same family is another study: ``Study(profile, {"A": ..., "B": ...}, layer=2)``.
        layer: the site; default: the profile's.
        style: the prompt style in which records are asked; default: the fixed prompt, which RL
            never saw.
        setting: which of the settings of 01's site scan this is, see :meth:`at`.
        position: where that setting's patches move both models: ``last`` prompt token or ``every``.
    """

    profile: Profile
    sources: Mapping[str, str | Path] | None = None
    layer: int | None = None
    style: str | None = None
    setting: str = "threshold"
    position: str = "last"

    @classmethod
    def open(cls, profile: str) -> "Study":
        """Of a profile by name or file; ``DFC_PROFILE`` overrides, see :func:`profiles.load`.

        Raises:
            ValueError: there is no such profile (the message lists them).
        """
        return cls(profiles.load(profile))

    def at(self, setting: str) -> "Study":
        """The same study in a setting that 01 chose by its site scan and wrote to `01_settings`.

        ``threshold``: the profile's A under the fixed prompt. ``final``: the model with which RL
        ended, under a prompt of its training. Caches, crosscoders and prompts are the setting's.

        Raises:
            FileNotFoundError: 01 has not run at this profile (the message says how).
            ValueError: there is no such setting (the message lists them).
        """
        from dfc_lib.results import figures, tables

        row = tables.only(figures.load_data("01_settings", self.profile), setting=setting)
        p = self.profile
        return replace(
            self,
            sources={"A": p.location(row.model), "B": p.location(p.model_b)},
            layer=int(row.layer),
            style=row.prompt,
            setting=setting,
            position=row.position,
        )

    def replicates(self) -> "dict[str, Study]":
        """The same setting on every pair beside the profile's own, by the pair's name.

        Each pair's A is its own model near threshold, by the rule of the data card (`near.csv`); in
        the setting ``final`` it is the last RL checkpoint. Layer, style and position stay. A pair
        without that file has none beside it.
        """
        import pandas as pd

        from dfc_lib.reading import specificity

        p = self.profile
        if not p.pair or not (paths.ROOT / p.pair / "near.csv").is_file():
            return {}
        studies = {}
        for name, profile in specificity.replications(self.profile).items():
            folder = paths.ROOT / profile.pair
            if folder == paths.ROOT / self.profile.pair:
                continue
            near = pd.read_csv(folder / "near.csv")
            step = int(near.step[near.near].iloc[0])
            model = profile.final if self.setting == "final" else f"rl/step_{step:04d}"
            sources = {"A": folder / model, "B": folder / profile.model_b}
            setting = f"pair_{name}_{self.setting}"
            studies[name] = replace(self, profile=profile, sources=sources, setting=setting)
        return studies

    def pairs(self) -> "dict[str, Study]":
        """This study and its :meth:`replicates` by the pair's name, their last tokens cached."""
        own = Path(self.profile.pair or self.profile.name).name
        others = self.replicates()
        for of_pair in others.values():
            of_pair.make_last_caches()
        return {own: self} | others

    # -- what there is

    @property
    def build(self) -> Path:
        """Where what this study makes is kept."""
        return paths.build(self.profile.name)

    @cached_property
    def pair(self) -> "Pair":
        """Both models, their tokenizer and the site."""
        from dfc_lib.data.pair import load_pair

        p = self.profile
        sources = self.sources or {"A": p.location(p.model_a), "B": p.location(p.model_b)}
        layer = p.layer if self.layer is None else self.layer
        return load_pair(sources, layer, dtype=p.dtype, device=p.device)

    def records(self, split: str) -> "list[Record]":
        """All prompts of a split."""
        from dfc_lib.data import corpora

        return corpora.records(self.profile, split)

    def calls(self, split: str, n: int | None = None, held_out: bool = False) -> "list[Record]":
        """The first ``n`` (default: all) prompts of a split whose gold is a call.

        Args:
            held_out: of the tools that no training run has seen, instead of the others.
        """
        records = self.records(split)
        return [r for r in records if r.kind == "call" and r.held_out == held_out][:n]

    def no_calls(self, split: str, n: int | None = None) -> "list[Record]":
        """The first ``n`` prompts of a split that need no call, of tools that were seen."""
        return [r for r in self.records(split) if r.kind != "call" and not r.held_out][:n]

    def neutral(self, split: str, n: int | None = None) -> list[str]:
        """The first ``n`` neutral texts of a split."""
        from dfc_lib.data import corpora

        return corpora.neutral(self.profile, split)[:n]

    def ids(self, records: "Sequence[Record]", style: str | None = None) -> list[list[int]]:
        """Prompts as token ids in a style (default: the study's)."""
        from dfc_lib.data import prompts

        tokenizer, style = self.pair.tokenizer, style or self.style or prompts.FIXED_STYLE
        return prompts.encode(tokenizer, [prompts.chat_text(tokenizer, r, style) for r in records])

    def cache(self, name: str) -> "Activations":
        """A cache of the pair's activations, by name: ``train_all``, ``train_last``, ..."""
        from dfc_lib.data.activations import Activations

        return Activations.open(paths.activations(self.profile.name, self.setting) / name)

    def texts(self, split: str, n: int) -> "pd.DataFrame":
        """Up to ``n`` tool prompts in the study's style and as many neutral texts, one a row.

        Returns:
            columns ``text``, ``split``, ``source`` (``tool``, ``neutral``) and ``kind``.
        """
        import pandas as pd

        from dfc_lib.data import prompts

        records, style = self.records(split)[:n], self.style or prompts.FIXED_STYLE
        neutral = self.neutral(split, len(records))
        columns = {
            "text": [prompts.chat_text(self.pair.tokenizer, r, style) for r in records] + neutral,
            "split": split,
            "source": ["tool"] * len(records) + ["neutral"] * len(neutral),
            "kind": [r.kind for r in records] + ["prose"] * len(neutral),
        }
        return pd.DataFrame(columns)

    def make_cache(
        self, name: str, texts: "pd.DataFrame", positions: str = "last", progress: bool = True
    ) -> "Activations":
        """Cache what both models make of texts (columns as of :meth:`texts`), or find it cached.

        One process at a time: a second one waits, and then finds it.
        """
        from dfc_lib.data import activations, prompts

        folder = paths.activations(self.profile.name, self.setting) / name
        with store.lock(folder.with_name(f".{name}.lock")):
            return activations.cache(
                self.pair,
                prompts.encode(self.pair.tokenizer, texts.text),
                folder,
                positions=positions,
                batch_size=self.profile.batch_reading,
                meta=texts[["split", "source", "kind"]],
                progress=progress,
            )

    def make_last_caches(self, progress: bool = False) -> None:
        """The caches ``train_last`` and ``ranking_last``, where 01 has not made them."""
        p = self.profile
        for name, split, n in (
            ("train_last", "crosscoder", p.n_crosscoder_texts),
            ("ranking_last", "ranking", p.n_ranking),
        ):
            self.make_cache(name, self.texts(split, n), progress=progress)

    @cached_property
    def recipes(self) -> "dict[str, Recipe]":
        """The recipes of crosscoders that the notebooks share, by name."""
        from dfc_lib.crosscoder import recipes

        return recipes.recipes(self.profile, self.setting)

    # -- crosscoders

    def crosscoders(
        self,
        recipes: "Mapping[str, Recipe] | Iterable[str] | None" = None,
        seeds: Iterable[int] | None = None,
        progress: bool = True,
    ) -> "dict[tuple[str, int], Crosscoder]":
        """Crosscoders by (recipe, seed), trained where they are not yet.

        Args:
            recipes: by name, or names of :attr:`recipes`; default: all of these.
            seeds: default: the profile's.

        Raises:
            KeyError: there is no recipe of that name (the message lists them).
        """
        if not isinstance(recipes, Mapping):
            names = list(self.recipes if recipes is None else recipes)
            if unknown := [name for name in names if name not in self.recipes]:
                raise KeyError(f"no recipe {unknown[0]!r}; there are: {', '.join(self.recipes)}")
            recipes = {name: self.recipes[name] for name in names}
        seeds = self.profile.seeds if seeds is None else list(seeds)
        jobs = {(name, s): recipe.job(s) for name, recipe in recipes.items() for s in seeds}
        return self.train(jobs, progress)

    def train(self, jobs: "Mapping[Any, Job]", progress: bool = True) -> "dict[Any, Crosscoder]":
        """As :meth:`crosscoders`, for any jobs, by the jobs' names."""
        from dfc_lib.crosscoder import training

        return training.get_all(jobs, self.build, self.profile.side_by_side, progress)

    # -- what models do

    def evaluate(
        self, model: Any, records: "Sequence[Record]", style: str, **options: Any
    ) -> "pd.DataFrame":
        """What a model does on prompts when it is left alone; see ``evaluation.evaluate``.

        Args:
            model: one of the pair's by name, or any other with the pair's tokenizer.

        Raises:
            KeyError: the pair has no model of that name (the message lists them).
        """
        from dfc_lib.steering import evaluation

        if isinstance(model, str) and model not in self.pair.models:
            raise KeyError(f"no model {model!r}; this study has: {', '.join(self.pair.models)}")
        model = self.pair.models[model] if isinstance(model, str) else model
        limits = {
            "batch_size": self.profile.batch_generation,
            "max_new_tokens": self.profile.max_new_tokens,
        }
        return evaluation.evaluate(model, self.pair.tokenizer, records, style, **(limits | options))

    def run(
        self,
        cells: "Mapping[Hashable, Intervention]",
        records: "Sequence[Record]",
        target: str = "A",
        *,
        levels: Sequence[str] = ("cell",),
        **options: Any,
    ) -> "pd.DataFrame":
        """What a model does under every intervention; see ``evaluation.intervene``.

        Args:
            cells: the grid; each cell is named by a tuple, one value a level. A shorter tuple (or
                a single value) leaves the levels behind it missing.
            levels: what the values of a name mean; they are columns of the result.
            options: go to ``intervene``, in place of the profile's limits and of ``out_dir``, where
                what was generated is kept.
        """
        from dfc_lib.steering import evaluation

        options = {
            "batch_size": 4 * self.profile.batch_generation,
            "max_new_tokens": self.profile.max_new_tokens,
            "out_dir": self.build / "generations",
        } | options
        if self.style:
            options = {"style": self.style} | options
        return evaluation.intervene(self.pair, target, records, cells, levels=levels, **options)

    def propensity(
        self,
        cells: "Mapping[Hashable, Intervention]",
        records: "Sequence[Record]",
        target: str = "A",
        *,
        levels: Sequence[str] = ("cell",),
        **options: Any,
    ) -> "pd.DataFrame":
        """As :meth:`run`, of the first generated token alone: nothing more is generated, so a
        control of hundreds of directions costs little.

        Returns:
            one line per (record, cell): ``prompt``, the levels, ``delta``, ``margin`` and
            ``propensity``.
        """
        frame = self.run(cells, records, target, levels=levels, **options, max_new_tokens=1)
        return frame[["prompt", *levels, "delta", "margin", "propensity"]]

    def asking(
        self, records: "Sequence[Record]", levels: Sequence[str] = ("cell",)
    ) -> "Callable[..., pd.DataFrame]":
        """:meth:`propensity` on one set of prompts, which the models read once for all its calls.

        Returns:
            a function of cells, and of ``target`` (default: A).
        """
        from dfc_lib.steering.prefix import PrefixCache

        read = PrefixCache(self.pair, self.ids(records), self.profile.batch_reading)
        fixed = {"levels": levels, "out_dir": None, "prefix_cache": read, "progress": False}
        return partial(self.propensity, records=records, **fixed)
