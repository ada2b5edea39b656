"""The pages that are drawn from the code, and what the site makes of links that leave it."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pydantic
import pytest

from resilience.cli import examples
from resilience.config import Config
from resilience.rpc.v1 import coordinator_pb2, guardian_pb2, operator_pb2

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"


@pytest.fixture(scope="module")
def drawing() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "gen_docs.py"))


def test_the_pages_are_those_of_this_code(drawing: dict[str, Any]) -> None:
    stale = [str(path) for path, text in drawing["pages"]().items() if path.read_text(encoding="utf-8") != text]
    assert not stale, "run scripts/gen-docs"


def test_every_setting_stands_in_the_reference_with_its_sentence() -> None:
    text = (REFERENCE / "configuration.md").read_text(encoding="utf-8")
    for section, field in Config.model_fields.items():
        model = field.annotation
        if not (isinstance(model, type) and issubclass(model, pydantic.BaseModel)):
            continue
        _, _, below = text.partition(f"## `[{section}]`\n")
        table = below.partition("\n## ")[0]
        for key, setting in model.model_fields.items():
            assert f"\n| `{key}` |" in table, f"{section}.{key}"
            assert setting.description, f"{section}.{key} says nothing"


def test_every_call_and_message_stands_in_the_reference() -> None:
    text = (REFERENCE / "protocol.md").read_text(encoding="utf-8")
    for module in (coordinator_pb2, guardian_pb2, operator_pb2):
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                assert re.search(rf"\| `{method.name}` \| .*`{method.input_type.name}`", text), method.full_name
        for message in module.DESCRIPTOR.message_types_by_name.values():
            table = text.partition(f"### message `{message.name}`\n")[2].partition("\n### ")[0]
            for field in message.fields:
                assert f"| {field.number} | `{field.name}` |" in table, field.full_name
        for enum in module.DESCRIPTOR.enum_types_by_name.values():
            for value in enum.values:
                assert f"| {value.number} | `{value.name}` |" in text, value.name


def test_every_verb_stands_in_the_reference_with_its_examples() -> None:
    text = (REFERENCE / "cli.md").read_text(encoding="utf-8")
    for name, entry in examples.HELP.items():
        assert re.search(rf"^### `resilience {re.escape(name)}[` ]", text, flags=re.MULTILINE), name
        for command, _ in entry.examples:
            assert f"$ {command}\n" in text, command


def test_a_line_of_the_protocol_that_is_not_understood_is_named(drawing: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "odd.proto"
    path.write_text("message Odd {\n  group Old = 1 {}\n}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"odd\.proto:2: .*is not understood"):
        drawing["_proto"](path)


def test_what_angle_brackets_and_bars_would_break_is_escaped(drawing: dict[str, Any]) -> None:
    assert drawing["_cell"]("a | b\n<c>") == r"a \| b \<c>"


def test_a_link_out_of_the_site_becomes_the_name_of_its_file() -> None:
    on_page_markdown = runpy.run_path(str(ROOT / "scripts" / "docs_links.py"))["on_page_markdown"]
    page = SimpleNamespace(file=SimpleNamespace(src_uri="benchmarks/gpu.md"))
    text = "[k](../../kernels/README.md#x) [d](../detection.md) [w](https://example.org/../a) ![i](../../kernels/i.png)"
    assert on_page_markdown(text, page=page) == (
        "k (`kernels/README.md`) [d](../detection.md) [w](https://example.org/../a) ![i](../../kernels/i.png)"
    )
