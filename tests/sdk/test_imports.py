from __future__ import annotations

import json
import subprocess
import sys

import modelbus
import modelbus_broker.errors

#: Loaded by nothing that only imports the package.
HEAVY = ["nats", "pydantic", "jinja2", "aiohttp", "torch", "transformers", "click", "rich", "nacl", "prometheus_client"]


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout


def test_importing_the_package_is_quick_and_loads_no_heavy_library() -> None:
    code = (
        "import sys, time, json; before = time.perf_counter(); import modelbus; took = time.perf_counter() - before;"
        f"print(json.dumps([took, [name for name in {HEAVY!r} if name in sys.modules]]))"
    )

    took_s, loaded = json.loads(run_python(code))

    assert loaded == []
    assert took_s <= 0.35


def test_the_help_of_the_command_line_connects_to_nothing() -> None:
    code = f"import sys, modelbus.cli; print([name for name in {HEAVY!r} if name in sys.modules])"

    assert run_python(code).strip() == "['click']"


def test_every_public_name_can_be_had_and_is_listed() -> None:
    assert sorted(modelbus.__all__) == modelbus.__all__ or set(modelbus.__all__) == set(dir(modelbus))
    for name in modelbus.__all__:
        assert getattr(modelbus, name) is not None


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    assert not hasattr(modelbus, "nonsense")


def test_all_errors_are_one_tree_and_are_exported() -> None:
    defined = {
        value
        for value in vars(modelbus_broker.errors).values()
        if isinstance(value, type) and issubclass(value, modelbus_broker.errors.ModelBusError)
    }

    assert {getattr(modelbus.errors, name) for name in modelbus.errors.__all__} == defined
    assert all(issubclass(error, modelbus.ModelBusError) for error in defined)


def test_the_version_is_that_of_the_distribution() -> None:
    from importlib.metadata import version

    assert modelbus.__version__ == version("modelbus")
