"""What add-modality settles before it trains, and what recipes say of streams when domains come together."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mdltool.errors import MdlError
from mdltool.recipe import load, validate
from mdltool.schema import Recipe
from mdltool.stages.continuing import joined, recipe_of, settled
from mdltool.stages.merge_domain import _joined
from mdltool.stages.modalities import Addition, Wanted, settle
from mdltool.stages.plan import modalities
from mdltool.types import StreamInfo

AUDIO, TEXT = StreamInfo("audio", 64, "log_mel", {}, "1", 3), StreamInfo("text", 32, "hashed_ngrams", {}, "1", 3)
ARTIFACT: Any = SimpleNamespace(path=Path("m"))


def index(**streams: StreamInfo) -> Any:
    """As much of a ShardIndex as is looked at before the training."""
    return SimpleNamespace(folder=Path("s"), streams=streams)


def stored(**changes: Any) -> dict[str, Any]:
    """The recipe of a model of `sound` and `sight`; changes: of the losses, the augmentation or the adapters."""
    recipe = load("tiny_sound").model_dump(mode="json")
    recipe["domains"]["sight"] = recipe["domains"]["sound"]
    recipe["losses"] |= changes.get("losses", {})
    recipe["data"]["augment"] |= changes.get("augment", {})
    return recipe


def settled_for(
    recipe: dict[str, Any],
    wanted: Wanted,
    streams: dict[str, Any] | None = None,
    share: tuple[str, ...] = (),
    indices: dict[str, Any] | None = None,
) -> Addition:
    adapters = [{"type": "caa", "sites": "all", "options": {"share": share}}] if share else []
    spec = {
        "backbone": "swin3d_tiny",
        "backbone_options": {},
        "num_frames": 4,
        "crop": 48,
        "domains": {},
        "adapters": adapters,
        "streams": streams or {},
    }
    there = indices or {"sound": index(audio=AUDIO, text=TEXT)}
    return settle({"recipe": recipe, "spec": spec}, wanted, there, ARTIFACT)


def test_overrides_leave_the_models_own_recipe_alone() -> None:
    recipe = stored()
    before = copy.deepcopy(recipe)
    sets = ("train.steps.0.optimizer.lr=9", "data.augment.flip=0.5")
    added = settled_for(recipe, Wanted(("audio",), overrides=sets))
    assert recipe == before
    assert added.training.train.steps[0].optimizer.lr == 9
    assert added.recipe.train.steps[0].optimizer.lr == before["train"]["steps"][0]["optimizer"]["lr"]
    assert (added.training.data.augment.flip, added.recipe.data.augment.flip) == (0.5, 0.0)
    settled(recipe, sets, ARTIFACT)
    assert recipe == before


@pytest.mark.parametrize(
    ("changes", "gone"),
    [
        ({"augment": {"mixup": 0.8, "cutmix": 1.0}}, "mixup, cutmix"),
        ({"losses": {"inf": {"eps": 0.001}, "norm": "total"}}, "inf"),
    ],
)
def test_a_model_of_frames_alone_goes_on_without_what_streams_cannot_follow(
    changes: dict[str, Any], gone: str, capsys: pytest.CaptureFixture[str]
) -> None:
    added = settled_for(stored(**changes), Wanted(("audio",)))
    for recipe in (added.training, added.recipe):
        assert (recipe.losses.inf, recipe.data.augment.mixup, recipe.data.augment.cutmix) == (None, 0, 0)
        validate(recipe.model_dump(mode="json"), "test")
    assert f"goes on without {gone}:" in " ".join(capsys.readouterr().err.split())


def test_the_adapter_may_be_named_by_its_type_until_the_model_has_it() -> None:
    sets = ("adapters.caa.d=64", "streams.audio.width=48")
    added = settled_for(stored(), Wanted(("audio",), overrides=sets))
    assert added.recipe.adapters[-1].options["d"] == 64
    assert added.recipe.streams["audio"].width == 48
    has = stored() | {"adapters": [*stored()["adapters"], {"type": "caa"}]}
    with pytest.raises(MdlError, match="the finished model settles this key"):
        settled_for(has, Wanted(("audio",), overrides=sets[:1]))
    with pytest.raises(MdlError, match="share: there is no domain 'sond'"):
        settled_for(stored(), Wanted(("audio",), overrides=("adapters.caa.share=[sond]",)))


def test_another_recipes_stream_takes_the_width_of_the_shards() -> None:
    plan, sets = load("cm3t_ek100"), ("streams.audio.input=64", "streams.audio.embedder=linear")
    added = settled_for(stored(), Wanted(("audio",), plan, sets))
    assert modalities(added.training, "sound") == {"audio": 64}


def test_a_kind_is_what_the_other_recipe_has_for_the_domain() -> None:
    plan = load("cm3t_udiva").model_dump(mode="json")
    plan["domains"]["sound"] = plan["domains"]["udiva"] | {"streams": ["audio_other", "text_self"]}
    heard = index(**dict.fromkeys(plan["streams"], StreamInfo("audio", 1024, "log_mel", {}, "1", 3)))
    for domains, names in ((("sound", "udiva"), ["audio_other"]), (("udiva",), ["audio_self", "audio_other"])):
        kept = plan | {"domains": {name: plan["domains"][name] for name in domains}}
        wanted = Wanted(("audio",), Recipe.model_validate(kept))
        assert settled_for(stored(), wanted, indices={"sound": heard}).streams == {"sound": names}


def test_domains_that_nobody_named_are_passed_over(capsys: pytest.CaptureFixture[str]) -> None:
    indices = {"sight": index(), "sound": index(audio=AUDIO)}
    added = settled_for(stored(), Wanted(("audio",), all_found=True), indices=indices)
    assert added.streams == {"sound": ["audio"]}
    assert list(added.training.domains) == ["sound"]
    assert added.recipe.domains["sight"].streams == []
    assert "sight stays as it is" in capsys.readouterr().err
    with pytest.raises(MdlError, match="the shards of 'sight' have no audio"):
        settled_for(stored(), Wanted(("audio",)), indices=indices)
    with pytest.raises(MdlError, match="have no flow"):
        settled_for(stored(), Wanted(("flow",), all_found=True), indices=indices)
    assert not capsys.readouterr().err, "the error says it"


@pytest.mark.parametrize(
    ("word", "fix"),
    [
        ("auido", "did you mean 'audio'?"),
        ("flow", "shard again with --modality flow"),
        ("audio_left", "shard again with --modality audio_left"),
    ],
)
def test_what_shards_lack_is_misspelt_or_to_be_made(word: str, fix: str) -> None:
    with pytest.raises(MdlError, match=f"have no {word}") as told:
        settled_for(stored(), Wanted((word,)))
    assert told.value.fix == fix


def test_what_a_shared_cross_attention_has_already_is_nothing_to_train() -> None:
    recipe = stored() | {"adapters": [*stored()["adapters"], {"type": "caa", "share": ["sound", "sight"]}]}
    part = {"kind": "audio", "width": 512, "input": 64, "embedder": "linear"}
    recipe["streams"] = {"audio": part}
    has = {"sight": {"audio": {"kind": "audio", "width": 512, "input": 64, "embedder": "linear"}}}
    with pytest.raises(MdlError, match="shares its cross-attention with 'sight', which has audio already"):
        settled_for(recipe, Wanted(("audio",)), has, ("sound", "sight"))
    both = settled_for(recipe, Wanted(("audio", "text")), has, ("sound", "sight"))
    assert both.streams == {"sound": ["audio", "text"]}
    head = settled_for(recipe, Wanted(("audio",), train_head=True), has, ("sound", "sight"))
    assert head.streams == {"sound": ["audio"]}


def model_of(domain: str, *streams: str) -> dict[str, Any]:
    """The recipe of a model of one domain that reads all its streams."""
    recipe = load("cm3t_ek100").model_dump(mode="json")
    kept = {name: recipe["streams"][name] for name in streams}
    return recipe | {"domains": {domain: recipe["domains"]["ek100"]}, "streams": kept}


@pytest.mark.parametrize("streams", [(), ("flow",), ("flow", "audio")])
@pytest.mark.parametrize("own", [(), ("audio",), ("flow",)])
def test_domains_that_come_together_keep_their_streams(streams: tuple[str, ...], own: tuple[str, ...]) -> None:
    model, other = model_of("a", *streams), Recipe.model_validate(model_of("b", *own))
    part = recipe_of(other, "b")
    merged = validate(_joined(model, "b", part, "pack"), "merged")
    extended = Recipe.model_validate(joined(model, other, "b", ARTIFACT))
    for recipe in (merged, extended):
        assert list(modalities(recipe, "a")) == list(streams)
        assert list(modalities(recipe, "b")) == list(own)
    assert recipe_of(merged, "b")["domain"]["streams"] == part["domain"]["streams"], "the same file"


def test_a_stream_of_the_same_name_is_the_same_stream() -> None:
    other = model_of("b", "audio")
    other["streams"]["audio"]["extractor_version"] = "2"
    part = recipe_of(Recipe.model_validate(other), "b")
    with pytest.raises(MdlError, match="'b' has a stream 'audio' with extractor_version 2, the model has None"):
        _joined(model_of("a", "audio"), "b", part, "pack")
