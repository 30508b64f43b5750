"""Reading a configuration from a JSON or YAML file, and every file that is refused."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest
from configurations import CONFIGS, MINIMAL

from mesh_transformer import config as configuration
from mesh_transformer.config import ConfigError, ConfigWarning


def refusal(path: pathlib.Path) -> str:
    with pytest.raises(ConfigError) as caught:
        configuration.load(path)
    return str(caught.value).removeprefix(f"{path}: 1 problem(s)\n  - ")


def test_yaml_says_the_same_as_json(tmp_path: pathlib.Path) -> None:
    text = "".join(f"{key}: {json.dumps(value)}\n" for key, value in MINIMAL.items())
    for name in ("x.yaml", "x.yml", "X.YAML"):
        (tmp_path / name).write_text(text + "pe: none\nval_set: {}\ntrackers: [wandb]\n")
        config = configuration.load(tmp_path / name)
        assert config == configuration.parse(MINIMAL | {"pe": "none", "trackers": ["wandb"]})


def test_a_yaml_number_that_is_text_is_refused_with_a_spelling_that_is_none(
    tmp_path: pathlib.Path,
) -> None:
    flat = {key: value for key, value in MINIMAL.items() if key != "end_lr"}
    text = "".join(f"{key}: {json.dumps(value)}\n" for key, value in flat.items())
    path = tmp_path / "x.yaml"
    path.write_text(text + "end_lr: 1e-5\n")
    problem = refusal(path)
    assert problem == (
        "end_lr: expected a number, got '1e-5' (str); write 1.0e-05 without quotes "
        "(YAML takes 1e-5 for text: it lacks a dot)"
    )
    path.write_text(text + "end_lr: 1.0e-05\n")
    assert configuration.load(path).optimizer.end_lr == 1e-5


@pytest.mark.parametrize("name", ["x.json", "x.yaml"])
def test_keys_given_twice_are_refused(tmp_path: pathlib.Path, name: str) -> None:
    path = tmp_path / name
    text = json.dumps(MINIMAL | {"val_batches": 1})[:-1]
    path.write_text(text + ', "val_set": {"pile": "a", "pile": "b"}}')
    assert refusal(path) == "key 'pile' is given more than once"
    path.write_text(text + ', "lr": 0.002, "val_set": {"pile": "a"}}')
    assert refusal(path) == "key 'lr' is given more than once"


def test_yaml_anchors_may_be_merged_more_than_once(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(
        json.dumps(MINIMAL)[:-1] + ', val_set: {<<: {}, <<: {"a": "x"}}, val_batches: 1}'
    )
    assert configuration.load(path).data.val_set == {"a": "x"}


def test_a_file_that_cannot_be_read_is_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "quickstart.json"
    path.write_text('{"layers": 2,\n "seq" 3}')
    assert refusal(path) == "not JSON: Expecting ':' delimiter: line 2 column 8 (char 21)"
    assert refusal(tmp_path / "quickstrat.json") == (
        "there is no such file; did you mean 'quickstart.json'?"
    )
    assert refusal(tmp_path / "other") == "expected a name that ends in .json, .yaml, .yml"
    assert refusal(tmp_path / "zzz" / "y.json") == "there is no such file"
    path.write_text("[1]")
    assert refusal(path) == "expected keys and values, got [1]"
    path.write_bytes(b'{"name": "\xff"}')
    assert refusal(path) == (
        "'utf-8' codec can't decode byte 0xff in position 10: invalid start byte"
    )
    path.unlink()
    path.mkdir()
    assert refusal(path) == "cannot be read: Is a directory"


def test_yaml_that_cannot_be_read_is_refused(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("a: [1\n")
    assert refusal(path) == (
        'not YAML: while parsing a flow sequence in "<unicode string>", line 1, column 4: a: [1 ^ '
        "expected ',' or ']', but got '<stream end>' in \"<unicode string>\", line 2, column 1: ^"
    )
    path.write_text("")
    assert refusal(path) == "expected keys and values, got null"
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert refusal(path) == "YAML needs the package pyyaml; install it, or write JSON"


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(MINIMAL), encoding="utf-8-sig")
    assert configuration.load(path) == configuration.parse(MINIMAL)


def test_all_problems_of_a_file_are_reported_at_once(tmp_path: pathlib.Path) -> None:
    flat = MINIMAL | {"layers": "28", "norm": "layernrom", "d_ff": 101, "cores_per_replica": 4}
    del flat["train_set"]
    path = tmp_path / "x.json"
    path.write_text(json.dumps(flat | {"warm": 1})[:-1] + ', "lr": 0.1, "lr": 0.2}')
    with pytest.raises(ConfigError) as caught:
        configuration.load(path)
    assert (
        str(caught.value)
        == f"""{path}: 6 problem(s)
  - key 'lr' is given more than once
  - unknown key 'warm'
  - missing key 'train_set'
  - layers: expected a whole number, got '28' (str); write 28 without quotes
  - norm: 'layernrom' is not one of 'layernorm', 'layernorm-nobias', 'layernorm-desync', \
'rmsnorm', 'rmsnorm-bias', 'scalenorm', 'scalenorm-bias', 'rmsnorm-mean', \
'rmsnorm-mean-plus-one'; did you mean 'layernorm'?
  - cores_per_replica 4 does not divide d_ff 101; the next d_ff that it divides is 104"""
    )


def test_a_warning_points_at_the_line_that_asked_for_the_configuration(
    tmp_path: pathlib.Path,
) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(MINIMAL | {"early_cast": True}))
    for ask in (
        lambda: configuration.load(path),
        lambda: configuration.parse(MINIMAL | {"sampler": 1}),
    ):
        with pytest.warns(ConfigWarning) as caught:
            ask()
        assert caught[0].filename == __file__


def test_importing_and_loading_json_needs_the_standard_library_alone() -> None:
    program = f"""
import sys

class OnlyStandardLibrary:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {{*sys.stdlib_module_names, "mesh_transformer"}}:
            raise ImportError(name)

sys.meta_path.insert(0, OnlyStandardLibrary())
from mesh_transformer import config
print(config.load({str(CONFIGS[0])!r}).run.name)
"""
    done = subprocess.run(
        [sys.executable, "-S", "-c", program],
        cwd=CONFIGS[0].parent.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr, done.returncode) == ("GPT3_6B_pile_rotary\n", "", 0)
