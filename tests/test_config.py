"""A configuration file says what runs, and every mistake in it has a message that names the cure."""

from pathlib import Path
from typing import Any, Literal

import pytest

from omnisieve.config import (
    ConfigError,
    EvalConfig,
    TrainConfig,
    check_fields,
    describe,
    load_config,
    read_config,
    save_config,
)

MINIMAL = """
model: {path: some/model}
compressor: {method: omnisift, width: 64, retained_ratio: 0.25}
data: {train: train.jsonl}
train: {max_steps: 10, lr: 1e-4}
output_dir: runs/x
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    return path


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_file_then_command_line(recipe: Path):
    config = load_config(TrainConfig, ["--config", str(recipe), "train.lr=3e-3", "compressor.width=128"])
    assert isinstance(config, TrainConfig)
    assert config.train.lr == 3e-3
    assert config.compressor == {"method": "omnisift", "width": 128, "retained_ratio": 0.25}
    assert config.train.min_lr_ratio == 0.1


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", "1.0e-04"])
def test_scientific_notation_is_a_number(recipe: Path, text: str):
    write(recipe, MINIMAL.replace("1e-4", text))
    assert read_config(TrainConfig, recipe).train.lr == 1e-4
    assert read_config(TrainConfig, recipe, [f"compressor.scale={text}"]).compressor["scale"] == 1e-4


def test_lists_and_null_on_the_command_line(tmp_path: Path):
    path = write(tmp_path / "eval.yaml", "model: {path: m}\nmanifest: a.jsonl\noutput_dir: o\nmethods: [full]\n")
    overrides = ["methods=[full,random,runs/quick start/export]", "ratios=[0.35,1]", "data.feature_cache=null"]
    config = read_config(EvalConfig, path, overrides)
    assert config.methods == ["full", "random", "runs/quick start/export"]
    assert config.ratios == [0.35, 1.0]
    assert config.data.feature_cache is None


def test_settings_of_methods_may_depend_on_the_ratio(tmp_path: Path):
    text = "model: {path: m}\nmanifest: a\noutput_dir: o\nmethods: [mine]\n"
    settings = "settings:\n  mine: {method: stvp, at: {0.25: {audio_ratio: 0.4}}}\n"
    config = read_config(EvalConfig, write(tmp_path / "eval.yaml", text + settings))
    assert config.settings == {"mine": {"method": "stvp", "at": {0.25: {"audio_ratio": 0.4}}}}
    save_config(config, tmp_path / "saved.yaml")
    assert read_config(EvalConfig, tmp_path / "saved.yaml") == config


@pytest.mark.parametrize("flag", [["--local_rank", "1"], ["--local-rank=1"], ["--local_rank=0"]])
def test_the_launchers_rank_is_tolerated(recipe: Path, flag: list[str]):
    config = load_config(TrainConfig, [*flag, "--config", str(recipe), "train.seed=7"])
    assert config.train.seed == 7


@pytest.mark.parametrize(
    ("line", "key", "nearest"),
    [
        ("train.lrr=1", "train.lrr", "train.lr"),
        ("lr=1", "lr", "train.lr"),
        ("trian.lr=1", "trian", "train"),
        ("train.estimator.rout=masked", "train.estimator.rout", "train.estimator.route"),
        ("data.max_second=3", "data.max_second", "data.audio.max_seconds"),
        ("train.lr.x=1", "train.lr", "float"),
    ],
)
def test_an_unknown_key_names_the_nearest(recipe: Path, line: str, key: str, nearest: str):
    with pytest.raises(ConfigError, match=r"^command line: ") as error:
        read_config(TrainConfig, recipe, [line])
    assert key in str(error.value)
    assert nearest in str(error.value)


def test_a_mistake_in_the_file_names_the_file(recipe: Path):
    write(recipe, MINIMAL + "evaluate: 3\n")
    with pytest.raises(ConfigError) as error:
        read_config(TrainConfig, recipe)
    assert str(error.value).startswith(f"{recipe}: unknown key 'evaluate'")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train.lr=fast", "train.lr is 'fast'; expected float"),
        ("train.max_steps=1.5", "train.max_steps is 1.5; expected int"),
        ("train.max_steps=true", "train.max_steps is True; expected int"),
        ("train.seed=null", "train.seed is None; expected int"),
        ("train.ratio.min=low", "train.ratio.min is 'low'; expected float or null"),
        ("train.estimator.route=soft", "expected one of masked, hard_drop"),
        ("train=3", "train is 3; expected a section with keys such as train.max_steps"),
        ("train.estimator=null", "train.estimator is None; expected a section"),
        ("compressor=omnisift", "compressor is 'omnisift'; expected mapping"),
        ("data.train=${model.path}", "use a YAML anchor"),
        ("train.lr", "'train.lr' is not an override"),
        ("=3", "'=3' is not an override"),
        ("data.train=[a", "command line: data.train=[a: "),
    ],
)
def test_a_wrong_value_says_what_was_expected(recipe: Path, line: str, message: str):
    with pytest.raises(ConfigError) as error:
        read_config(TrainConfig, recipe, [line])
    assert str(error.value).startswith("command line: ")
    assert message in str(error.value)


def test_a_wrong_list_item_names_the_list(tmp_path: Path):
    path = write(tmp_path / "eval.yaml", "model: {path: m}\nmanifest: a\noutput_dir: o\nmethods: [full]\nratios: [x]\n")
    with pytest.raises(ConfigError, match=r"ratios is \['x'\]; expected list of float"):
        read_config(EvalConfig, path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train.lr=0", "train.lr is 0.0; it must be above 0"),
        ("train.warmup_ratio=2", "train.warmup_ratio is 2.0; it must lie in"),
        ("train.eval_every=-1", "train.eval_every is -1; it must not be negative"),
        ("train.estimator.candidates=1.5", "train.estimator.candidates is 1.5"),
        ("train.llm.lora.dropout=1", "train.llm.lora.dropout is 1.0; it must lie in [0, 1)"),
        ("train.ratio.min=0.2", "train.ratio needs both"),
        ("train.ratio={min: 0.5, max: 0.2}", "train.ratio is [0.5, 0.2]"),
        ("train.stop_at=0", "train.stop_at is 0; it must be above 0"),
        ("train.max_steps=0", "train.max_steps is 0; it must be above 0"),
        ("train.zero_stage=0", "train.zero_stage is 0; choose 1, 2 or 3 (0 would"),
        ("train.offload.parameters=true", "train.offload.parameters needs train.zero_stage=3"),
        ("model={attn_implementation: flash_attention_2, dtype: float32}", "needs model.dtype=bfloat16"),
        (
            "model={encoder_attn_implementation: flash_attention_2, dtype: float32}",
            "model.encoder_attn_implementation flash_attention_2 needs model.dtype=bfloat16",
        ),
        ("model.attn_implementation=flash_attention_2", "is not used by train.estimator.route masked"),
        ("model.attn_implementation=eager", "eager is not used by train.estimator.route masked"),
        ("data={min_pixels: 3136, max_pixels: 10}", "data.min_pixels 3136 is above data.max_pixels 10"),
        ("data={min_frames: 8, max_frames: 4}", "data.min_frames 8 is above data.max_frames 4"),
        ("data.total_pixels=0", "data.total_pixels is 0; it must be above 0"),
        ("data.max_tokens=0", "data.max_tokens is 0; it must be above 0"),
        (
            "data={max_tokens: 9, too_long: lower_fps, feature_cache: features}",
            "data.too_long is lower_fps, but the frame rate of what is in data.feature_cache is fixed",
        ),
        ("data.audio.max_seconds=-1", "data.audio.max_seconds is -1.0"),
    ],
)
def test_a_value_out_of_range_is_refused(recipe: Path, line: str, message: str):
    with pytest.raises(ConfigError) as error:
        read_config(TrainConfig, recipe, [line])
    assert str(recipe) in str(error.value)
    assert message in str(error.value)


def test_a_protocol_that_there_is_not_is_refused(recipe: Path):
    names = "processor, qwen_omni_utils, omnisift, omnizip, seats or null"
    with pytest.raises(ConfigError, match=f"data.protocol is 'omnisifft'; expected one of {names}"):
        read_config(TrainConfig, recipe, ["data.protocol=omnisifft"])


def test_other_attention_trains_the_other_route(recipe: Path):
    overrides = ["model.attn_implementation=flash_attention_2", "train.estimator.route=hard_drop"]
    assert read_config(TrainConfig, recipe, overrides).model.attn_implementation == "flash_attention_2"


def test_flash_attention_serves_the_encoders_of_the_masked_route(recipe: Path):
    config = read_config(TrainConfig, recipe, ["model.encoder_attn_implementation=flash_attention_2"])
    assert config.train.estimator.route == "masked"
    assert config.model.attn_implementation == "sdpa"


@pytest.mark.parametrize("line", ["ratios=[0.25,0]", "ratios=[1.5]", "methods=[]", "bootstrap=0", "limit=0"])
def test_an_evaluation_out_of_range_is_refused(tmp_path: Path, line: str):
    path = write(tmp_path / "eval.yaml", "model: {path: m}\nmanifest: a\noutput_dir: o\nmethods: [full]\n")
    with pytest.raises(ConfigError, match=line.partition("=")[0]):
        read_config(EvalConfig, path, [line])


def test_missing_values_are_all_named(tmp_path: Path):
    path = write(tmp_path / "empty.yaml", "model: {dtype: float32}\ncompressor: {method: full}\n")
    with pytest.raises(ConfigError) as error:
        read_config(TrainConfig, path)
    for key in ("model.path", "data.train", "train.max_steps", "output_dir"):
        assert key in str(error.value)


def test_the_method_must_be_named(recipe: Path):
    write(recipe, MINIMAL.replace("method: omnisift, ", ""))
    with pytest.raises(ConfigError, match=r"compressor\.method is missing"):
        read_config(TrainConfig, recipe)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "output_dir: runs/y\n", "duplicate key output_dir"),
        ("- a\n- b\n", "holds a list"),
        ("a: [1\n", "cannot be read as YAML"),
    ],
)
def test_an_unreadable_file_is_refused(tmp_path: Path, text: str, message: str):
    path = write(tmp_path / "bad.yaml", text)
    with pytest.raises(ConfigError, match=message) as error:
        read_config(TrainConfig, path)
    assert str(path) in str(error.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        read_config(TrainConfig, tmp_path / "nowhere.yaml")


def test_yaml_anchors_work(tmp_path: Path):
    text = MINIMAL.replace("{train: train.jsonl}", "{train: &set all.jsonl, val: *set}")
    assert read_config(TrainConfig, write(tmp_path / "a.yaml", text)).data.val == "all.jsonl"


def test_a_saved_config_reads_back_equal(recipe: Path, tmp_path: Path):
    config = read_config(TrainConfig, recipe, ["train.ratio={min: 0.1, max: 0.5}", "data.val=v.jsonl"])
    save_config(config, tmp_path / "saved.yaml")
    assert read_config(TrainConfig, tmp_path / "saved.yaml") == config


def test_print_config_prints_what_would_run(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        load_config(TrainConfig, ["--config", str(recipe), "--print-config", "train.seed=5"])
    assert stop.value.code == 0
    printed = write(tmp_path / "printed.yaml", capsys.readouterr().out)
    assert read_config(TrainConfig, printed) == read_config(TrainConfig, recipe, ["train.seed=5"])


@pytest.mark.parametrize("schema", [TrainConfig, EvalConfig])
def test_help_describes_every_key(schema: type, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        load_config(schema, ["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert describe(schema) in printed
    assert "model.path: str, required" in printed
    assert "data.feature_cache: str or null, default null" in printed


def test_help_may_name_a_method(capsys: pytest.CaptureFixture[str]):
    def method_help(name: str | None) -> str:
        if name == "nothing":
            raise ValueError("there is no nothing")
        return f"about {name or 'all'}"

    asked = [(["-h"], 0, "about all"), (["a=1", "--help", "x"], 0, "about x"), (["-h", "nothing"], 2, "")]
    for words, code, told in asked:
        with pytest.raises(SystemExit) as stop:
            load_config(TrainConfig, words, description="It trains.", method_help=method_help)
        printed = capsys.readouterr()
        assert stop.value.code == code
        assert printed.out.strip().endswith(told)
        assert ("It trains." in printed.out) == (words == ["-h"])
    assert printed.err.strip().endswith("error: there is no nothing")


def test_a_recipe_of_the_other_program_is_named(recipe: Path, tmp_path: Path):
    other = write(tmp_path / "eval.yaml", "model: {path: m}\nmanifest: a.jsonl\noutput_dir: o\nmethods: [full]\n")
    with pytest.raises(ConfigError, match=r"eval\.yaml looks like a recipe of eval\.py, it has manifest, methods: use"):
        read_config(TrainConfig, other)
    with pytest.raises(ConfigError, match=r"recipe of train\.py, it has compressor, train: use train"):
        read_config(EvalConfig, recipe)
    write(recipe, f"{MINIMAL}manifest: a.jsonl\n")
    with pytest.raises(ConfigError, match="unknown key 'manifest'"):
        read_config(TrainConfig, recipe)


def test_a_text_where_a_list_is_meant_shows_the_list(tmp_path: Path):
    path = write(tmp_path / "eval.yaml", "model: {path: m}\nmanifest: a.jsonl\noutput_dir: o\nmethods: [full]\n")
    with pytest.raises(ConfigError, match=r"expected list of str, such as methods='\[full,random\]'$"):
        read_config(EvalConfig, path, ["methods=full,random"])


def test_an_unknown_flag_is_refused(recipe: Path):
    with pytest.raises(SystemExit) as stop:
        load_config(TrainConfig, ["--config", str(recipe), "--train.lr=1"])
    assert stop.value.code == 2


FIELDS: dict[str, Any] = {"width": int, "mode": Literal["a", "b"], "share": float | None}


def test_free_sections_are_checked_as_strictly():
    assert check_fields({"width": 3, "share": 1}, FIELDS, "x.yaml") == {"width": 3, "share": 1.0}
    assert check_fields({}, FIELDS, "x.yaml") == {}
    with pytest.raises(ConfigError, match=r"^x\.yaml: unknown key 'witdh'; the nearest valid key is 'width'"):
        check_fields({"witdh": 3}, FIELDS, "x.yaml")
    with pytest.raises(ConfigError, match=r"^x\.yaml: mode is 'c'; expected one of a, b"):
        check_fields({"mode": "c"}, FIELDS, "x.yaml")
    with pytest.raises(ConfigError, match=r"^x\.yaml: width is None; expected int"):
        check_fields({"width": None}, FIELDS, "x.yaml")
