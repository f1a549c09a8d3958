"""The published OmniSIFT checkpoint: a synthetic one of its names and shapes is imported in every form, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from omnisieve import load_backbone, load_compressor, save_compressor
from omnisieve.artifact import ArtifactError
from omnisieve.compressors.ratios import CompressorError
from omnisieve.layout import Modality, TokenLayout, TokenMap
from omnisieve.published import INDEX_FILE, PREFIX, SINGLE_FILE, import_omnisift
from tests.goldens.conftest import COMMITTED
from tests.goldens.layouts import input_layout
from tests.goldens.vectors import load, resolver
from tests.layouts import LayoutSpec, make_layout

WIDTH, HEADS = 512, 8
BACKBONE = Path(__file__).parent.parent / "data" / "testbed" / "backbone"
GOLDEN = COMMITTED / "omnisift_w3_4x4_a10_s0_a40_v67.npz"


def shapes(hidden: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published selector."""
    norms = {
        f"{name}.{part}": (WIDTH,) for name in ("v_norm", "a_norm", "post_attn_norm") for part in ("weight", "bias")
    }
    return norms | {
        "v_proj.weight": (WIDTH, hidden),
        "v_proj.bias": (WIDTH,),
        "a_proj.weight": (WIDTH, hidden),
        "a_proj.bias": (WIDTH,),
        "cross_attn.in_proj_weight": (3 * WIDTH, WIDTH),
        "cross_attn.in_proj_bias": (3 * WIDTH,),
        "cross_attn.out_proj.weight": (WIDTH, WIDTH),
        "cross_attn.out_proj.bias": (WIDTH,),
        "score_head.0.weight": (WIDTH // 2, WIDTH),
        "score_head.0.bias": (WIDTH // 2,),
        "score_head.2.weight": (1, WIDTH // 2),
        "score_head.2.bias": (1,),
    }


def state(hidden: int = 16, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A checkpoint's tensors: the selector's, and a few of the LLM and the talker beside it."""
    generator = torch.Generator().manual_seed(0)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(dtype)

    selector = {PREFIX + name: draw(shape) for name, shape in shapes(hidden).items()}
    return selector | {
        "thinker.model.layers.0.mlp.up_proj.weight": draw((4, 4)),
        "talker.codec_head.weight": draw((4,)),
    }


def of_compressor(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if name.startswith(PREFIX)}


def sharded(tensors: Mapping[str, Tensor], folder: Path) -> Path:
    """Three shards in turn, with their index."""
    folder.mkdir()
    shard_of = {name: f"model-0000{1 + number % 3}-of-00003.safetensors" for number, name in enumerate(tensors)}
    for shard in set(shard_of.values()):
        save_file({name: value for name, value in tensors.items() if shard_of[name] == shard}, folder / shard)
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    return folder


def one_in_a_folder(tensors: Mapping[str, Tensor], folder: Path) -> Path:
    folder.mkdir()
    save_file(dict(tensors), folder / SINGLE_FILE)
    return folder


def one_file(tensors: Mapping[str, Tensor], folder: Path) -> Path:
    return one_in_a_folder(tensors, folder) / SINGLE_FILE


def pickled(tensors: Mapping[str, Tensor], folder: Path) -> Path:
    folder.mkdir()
    torch.save(dict(tensors), folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


Write = Callable[[Mapping[str, Tensor], Path], Path]
FORMS = [sharded, one_in_a_folder, one_file, pickled]


@pytest.mark.parametrize("write", FORMS)
def test_every_form_gives_the_published_selector(write: Write, tmp_path: Path) -> None:
    tensors = state(hidden=3584, dtype=torch.bfloat16)
    compressor = import_omnisift(write(tensors, tmp_path / "checkpoint"))
    assert sum(parameter.numel() for parameter in compressor.parameters()) == 4_856_321
    assert not compressor.training
    settings = compressor.settings
    assert (settings.video_pruner, settings.score_norm, settings.rounding) == ("similarity", "none", "official")
    assert (settings.video_ratio, settings.audio_ratio) == (0.3, 0.7)
    loaded = load_compressor(save_compressor(compressor, tmp_path / "out")).state_dict()
    expected = {name.replace(PREFIX, "selector."): value for name, value in of_compressor(tensors).items()}
    assert loaded.keys() == expected.keys()
    for name, value in expected.items():
        assert loaded[name].dtype == torch.bfloat16
        assert torch.equal(loaded[name], value), name


def reference_keep(
    weights: Mapping[str, Tensor], embeds: Tensor, layout: TokenLayout, rates: tuple[float, float]
) -> Tensor:
    """[S] bool, one video with its sound: the published rules in plain steps, on a checkpoint's weights."""
    w = {name.removeprefix(PREFIX): value for name, value in weights.items()}
    modality, time = (torch.from_numpy(getattr(layout, name)[0]) for name in ("modality", "time"))
    keep = torch.ones(len(modality), dtype=torch.bool)
    moments = time[modality == Modality.VIDEO].unique().tolist()
    for chunk in range(0, len(moments), 2):
        pair, following = moments[chunk : chunk + 2], moments[chunk + 2 : chunk + 3] or [int(time.max()) + 1]
        frames = [((modality == Modality.VIDEO) & (time == moment)).nonzero()[:, 0] for moment in pair]
        first = embeds[frames[0]]
        alike = [F.cosine_similarity(first, first.mean(0, keepdim=True))]
        alike += [F.cosine_similarity(embeds[second], first) for second in frames[1:]]
        for places, redundancy in zip(frames, alike, strict=True):
            keep[places[redundancy.topk(int(len(first) * rates[0])).indices]] = False
        audio = (modality == Modality.AUDIO) & (time >= pair[0]) & (time < following[0])
        video = torch.isin(torch.arange(len(modality)), torch.cat(frames))
        if audio.sum() < 2:
            continue
        places = audio.nonzero()[:, 0]
        scores = reference_scores(w, embeds[video & keep], embeds[audio])
        keep[places] = False
        keep[places[scores.topk(len(places) - int(len(places) * rates[1])).indices]] = True
    return keep


def reference_scores(w: Mapping[str, Tensor], video: Tensor, audio: Tensor) -> Tensor:
    """[A] scores of audio tokens [A, D] given kept video tokens [V, D] (paper section 3.3)."""

    def norm(values: Tensor, name: str) -> Tensor:
        return F.layer_norm(values, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"])

    def heads(values: Tensor) -> Tensor:
        return values.reshape(len(values), HEADS, -1).transpose(0, 1)

    context = norm(F.linear(video, w["v_proj.weight"], w["v_proj.bias"]), "v_norm")
    query = norm(F.linear(audio, w["a_proj.weight"], w["a_proj.bias"]), "a_norm")
    parts = zip(
        (query, context, context), *(w[f"cross_attn.in_proj_{p}"].chunk(3) for p in ("weight", "bias")), strict=True
    )
    q, k, v = (heads(F.linear(*part)) for part in parts)
    attended = (q @ k.transpose(1, 2) / (WIDTH // HEADS) ** 0.5).softmax(-1) @ v
    attended = attended.transpose(0, 1).reshape(len(audio), WIDTH)
    attended = F.linear(attended, w["cross_attn.out_proj.weight"], w["cross_attn.out_proj.bias"])
    hidden = F.silu(
        F.linear(norm(query + attended, "post_attn_norm"), w["score_head.0.weight"], w["score_head.0.bias"])
    )
    return F.linear(hidden, w["score_head.2.weight"], w["score_head.2.bias"])[:, 0].sigmoid()


SPREAD_OUT = LayoutSpec(windows=7, grids_per_window=1, grid_every=2, rows=5, columns=6, audio_per_window=17)


def late_picture(layout: TokenLayout) -> TokenLayout:
    """The same with its video 1.6 s after its sound begins."""
    shifted = np.where(layout.modality == Modality.VIDEO, layout.time + 40, layout.time)
    maps = {field.name: getattr(layout, field.name)[0] for field in fields(TokenMap)} | {"time": shifted[0]}
    return TokenLayout.stack([TokenMap(**maps)])


@pytest.mark.parametrize(("preset", "rates"), [("omnisift/7b/code", (0.7, 0.3)), ("omnisift/7b/25", (0.77, 0.5))])
@pytest.mark.parametrize(
    "layout",
    [
        make_layout(LayoutSpec(rows=5, columns=6, audio_per_window=17)),
        make_layout(SPREAD_OUT),
        make_layout(replace(SPREAD_OUT, windows=5)),
        late_picture(make_layout(SPREAD_OUT)),
    ],
    ids=["two grids in a window", "a capped frame rate", "an odd number of grids", "sound before the picture"],
)
def test_it_selects_what_the_weights_of_the_checkpoint_select(
    preset: str, rates: tuple[float, float], layout: TokenLayout, tmp_path: Path
) -> None:
    tensors = state(hidden=256)
    compressor = import_omnisift(one_file(tensors, tmp_path / "checkpoint"), preset)
    assert compressor.settings.chunks == "pair_grids"
    embeds = torch.randn(1, layout.length, 256, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plan = compressor.plan(embeds, layout)
    assert torch.equal(plan.keep[0], reference_keep(tensors, embeds[0], layout, rates))
    assert plan.kept[0] == plan.keep.sum()


def test_an_older_export_keeps_its_windows(tmp_path: Path) -> None:
    imported = import_omnisift(one_file(state(), tmp_path / "checkpoint"), chunks="windows")
    folder = save_compressor(imported, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    assert config["settings"].pop("chunks") == "windows"
    (folder / "config.json").write_text(json.dumps(config))
    assert load_compressor(folder).settings.chunks == "windows"
    assert load_compressor(folder, chunks="pair_grids").settings.chunks == "pair_grids"


def test_it_selects_what_the_published_function_selected(tmp_path: Path) -> None:
    arrays = load(GOLDEN)
    params = {
        PREFIX + k.removeprefix("param."): torch.from_numpy(v) for k, v in arrays.items() if k.startswith("param.")
    }
    settings = {"video_ratio": 0.33, "audio_ratio": 0.6, "width": 32, "heads": 4}
    imported = import_omnisift(sharded(params, tmp_path / "checkpoint"), **settings)
    inputs = resolver(COMMITTED, COMMITTED)(str(arrays["inputs_file"]))
    loaded = load_compressor(save_compressor(imported, tmp_path / "out"))
    keep = loaded.plan(torch.from_numpy(inputs["inputs_embeds"]), input_layout(inputs)).keep
    assert torch.equal(keep, torch.from_numpy(arrays["keep_mask"]))


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "base_model.model."])
def test_what_wrappers_put_in_front_does_not_matter(prefix: str, tmp_path: Path) -> None:
    tensors = {prefix + name: value for name, value in state().items()}
    compressor = import_omnisift(pickled(tensors, tmp_path / "checkpoint"))
    bias = compressor.get_parameter("selector.v_proj.bias")
    assert torch.equal(bias, tensors[f"{prefix}{PREFIX}v_proj.bias"])


def test_the_llm_of_a_checkpoint_is_said_to_be_left_behind(tmp_path: Path) -> None:
    tensors = state()
    told = import_omnisift(one_file(tensors, tmp_path / "whole")).provenance["LLM"]
    assert told.startswith("not imported")
    assert "1 tensors" in told
    assert "give the checkpoint as model.path" in told
    alone = one_file(of_compressor(tensors), tmp_path / "alone")
    assert "LLM" not in import_omnisift(alone).provenance


def test_the_llm_of_a_checkpoint_loads_from_where_it_is(tmp_path: Path) -> None:
    folder = shutil.copytree(BACKBONE, tmp_path / "checkpoint")
    stock = {f"thinker.{name}": value for name, value in load_file(folder / SINGLE_FILE).items()}
    save_file({**stock, **of_compressor(state(hidden=128))}, folder / SINGLE_FILE, metadata={"format": "pt"})
    assert import_omnisift(folder).hidden_size == 128
    expected, loaded = (load_backbone(path).state_dict() for path in (BACKBONE, folder))
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


def test_only_the_shards_of_the_compressor_are_read(tmp_path: Path) -> None:
    folder = sharded(state(), tmp_path / "checkpoint")
    index = json.loads((folder / INDEX_FILE).read_text())
    index["weight_map"]["thinker.model.embed_tokens.weight"] = "model-00004-of-00004.safetensors"
    (folder / INDEX_FILE).write_text(json.dumps(index))
    imported = import_omnisift(folder).state_dict().values()
    assert sum(value.numel() for value in imported) == sum(value.numel() for value in of_compressor(state()).values())


def test_a_checkpoint_of_seventeen_gigabytes_costs_little_memory(tmp_path: Path) -> None:
    """Its LLM is a hole in the file: whoever reads it all takes 17 GB."""
    tensors, header, offset = state(), {}, 0
    for name, value in tensors.items():
        header[name] = {
            "dtype": "F32",
            "shape": list(value.shape),
            "data_offsets": [offset, offset + 4 * value.numel()],
        }
        offset += 4 * value.numel()
    size = 17 * 10**9
    header["thinker.lm_head.weight"] = {"dtype": "U8", "shape": [size], "data_offsets": [offset, offset + size]}
    text = json.dumps(header).encode()
    with (tmp_path / SINGLE_FILE).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.writelines(value.numpy().tobytes() for value in tensors.values())
        file.truncate(file.tell() + size)
    before = resident_bytes()
    imported = import_omnisift(tmp_path)
    assert resident_bytes() - before < 200e6
    assert torch.equal(imported.get_parameter("selector.v_proj.bias"), tensors[f"{PREFIX}v_proj.bias"])
    (tmp_path / SINGLE_FILE).unlink()


def resident_bytes() -> int:
    """Peak memory of this process."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def renamed(tensors: dict[str, Tensor]) -> None:
    tensors[f"{PREFIX}stranger.bias"] = tensors.pop(f"{PREFIX}v_proj.bias")


def doubled(tensors: dict[str, Tensor]) -> None:
    tensors[f"ema.{PREFIX}a_norm.bias"] = tensors[f"{PREFIX}a_norm.bias"].clone()


def narrowed(tensors: dict[str, Tensor]) -> None:
    tensors[f"{PREFIX}score_head.0.weight"] = torch.zeros(WIDTH // 2, WIDTH - 1)


def of_two_widths(tensors: dict[str, Tensor]) -> None:
    tensors[f"{PREFIX}v_proj.weight"] = torch.zeros(WIDTH, 15)


def without_projections(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{PREFIX}v_proj.weight"], tensors[f"{PREFIX}a_proj.weight"]


def of_two_precisions(tensors: dict[str, Tensor]) -> None:
    tensors[f"{PREFIX}v_norm.bias"] = tensors[f"{PREFIX}v_norm.bias"].half()


def without_compressor(tensors: dict[str, Tensor]) -> None:
    for name in of_compressor(tensors):
        del tensors[name]


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (renamed, r"missing: thinker\.compressor\.v_proj\.bias; left over: thinker\.compressor\.stranger\.bias"),
        (doubled, r"a_norm\.bias twice, as .*ema\.thinker\.compressor\.a_norm\.bias"),
        (narrowed, r"shape of thinker\.compressor\.score_head\.0\.weight: \(256, 511\) instead of \(256, 512\)"),
        (of_two_widths, r"thinker\.compressor\.v_proj\.weight \(512, 15\), .*a_proj\.weight \(512, 16\)"),
        (without_projections, r"lacks thinker\.compressor\.v_proj\.weight and thinker\.compressor\.a_proj\.weight"),
        (of_two_precisions, r"one floating-point precision: .*v_norm\.bias torch\.float16"),
        (without_compressor, r"no thinker\.compressor\.\* tensor"),
    ],
)
def test_tensors_that_do_not_fit_are_named(spoil: Callable, told: str, tmp_path: Path) -> None:
    tensors = state()
    spoil(tensors)
    with pytest.raises(ArtifactError, match=told):
        import_omnisift(one_file(tensors, tmp_path / "checkpoint"))


class Shell:
    """What a pickle could run."""

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("executed"),))


def test_nothing_in_a_checkpoint_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({**state(), "extra": Shell()}, "model.bin")
    with pytest.raises(ArtifactError, match="more than tensors"):
        import_omnisift("model.bin")
    assert not Path("executed").exists()


def test_files_that_are_no_checkpoint_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nowhere does not exist"):
        import_omnisift(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match=f"holds neither {INDEX_FILE} nor {SINGLE_FILE}"):
        import_omnisift(tmp_path)
    for name, told in (("a.safetensors", "no safetensors file"), ("a.bin", "not a state dict")):
        (tmp_path / name).write_bytes(b"\x00" * 64)
        with pytest.raises(ArtifactError, match=told):
            import_omnisift(tmp_path / name)
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    with pytest.raises(ArtifactError, match="something else than a state dict"):
        import_omnisift(tmp_path / "list.pt")


def test_a_folder_with_a_broken_index_is_named(tmp_path: Path) -> None:
    folder = sharded(state(), tmp_path / "checkpoint")
    name = f"{PREFIX}v_proj.weight"
    index = json.loads((folder / INDEX_FILE).read_text())
    shard = index["weight_map"][name]
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": index["weight_map"] | {name: "../elsewhere"}}))
    with pytest.raises(ArtifactError, match=r"'\.\./elsewhere', which is no file of its folder"):
        import_omnisift(folder)
    (folder / INDEX_FILE).write_text(json.dumps(index))
    (folder / shard).write_bytes((folder / shard).read_bytes()[:-4])
    with pytest.raises(ArtifactError, match=f"{shard} does not give"):
        import_omnisift(folder)
    (folder / shard).unlink()
    with pytest.raises(ArtifactError, match=f"{shard} is missing"):
        import_omnisift(folder)
    (folder / INDEX_FILE).write_text("{}")
    with pytest.raises(ArtifactError, match="no index of safetensors shards"):
        import_omnisift(folder)


def test_an_unknown_preset_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(CompressorError, match="did you mean 'omnisift/7b/35'"):
        import_omnisift(one_file(state(), tmp_path / "checkpoint"), "omnisift/7b/36")
