from __future__ import annotations

import pytest
from modelbus.errors import ConfigurationError
from modelbus.spec import DeploySpec, engine_choice, is_secret, masked, parse_params


def spec(**fields: object) -> DeploySpec:
    return DeploySpec(**{"model": "chat", **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model_type", "backend", "engine"),
    [
        ("saas/openai", "", "openai"),
        ("saas/deepseek", "", "openai"),
        ("custom/auto", "", "transformers"),
        ("custom/auto", "transformers", "transformers"),
        ("custom/auto", "vllm", "vllm"),
        ("custom/auto", "ray/vllm", "vllm"),
        ("custom/auto", "llama_cpp", "llama_cpp"),
        ("custom/bge", "", "transformers"),
        ("custom/llama2", "", "transformers"),
        ("echo", "", "echo"),
    ],
)
def test_the_type_and_the_backend_name_the_engine(model_type: str, backend: str, engine: str) -> None:
    asked = spec(pretrained_model_type=model_type, infer_backend=backend, model_path="/models/m")

    assert engine_choice(asked).engine == engine


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"pretrained_model_type": "custom/auto"}, "--model_path"),
        ({"pretrained_model_type": "custom/whisper", "model_path": "/m"}, "not served yet"),
        ({"pretrained_model_type": "other/thing"}, "is not known"),
        ({"pretrained_model_type": ""}, "is not known"),
        ({"pretrained_model_type": "saas/"}, "lacks the provider's name"),
        ({"infer_backend": "tgi", "model_path": "/m"}, "--infer_backend 'tgi'"),
        ({"model": " ", "pretrained_model_type": "echo"}, "--model is empty"),
        ({"num_workers": 0, "pretrained_model_type": "echo"}, "--num_workers 0"),
        ({"gpus_per_worker": -1.0, "pretrained_model_type": "echo"}, "--gpus_per_worker"),
        ({"priority": 10, "pretrained_model_type": "echo"}, "--priority"),
        ({"infer_params": {"gen.temperature": "0"}, "pretrained_model_type": "echo"}, "llm_config"),
        ({"infer_params": {"saas.model": "a", "model": "b"}, "pretrained_model_type": "saas/openai"}, "given twice"),
    ],
)
def test_a_spec_that_cannot_be_meant_is_refused_with_what_to_write(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        engine_choice(spec(**fields))


@pytest.mark.parametrize("value", ["", "env:", "file:"])
def test_an_empty_key_is_refused_with_the_three_ways_to_give_one(value: str) -> None:
    with pytest.raises(ConfigurationError, match="saas.api_key=env:NAME") as caught:
        engine_choice(spec(pretrained_model_type="saas/openai", infer_params={"saas.api_key": value}))

    assert "is the variable set" in str(caught.value)


def test_prefixes_are_cut_and_secrets_stand_apart() -> None:
    choice = engine_choice(
        spec(
            pretrained_model_type="saas/openai",
            infer_params={
                "saas.api_key": "sk-plain", "saas.model": "gpt", "backend.max_model_len": "28000", "timeout": "5",
                "saas.header.X-Team": "red", "resource.big": "0.5",
            },
        )
    )  # fmt: skip

    assert choice.params == {"model": "gpt", "max_model_len": "28000", "timeout": "5"}
    assert choice.secrets == {"api_key": "sk-plain", "header.X-Team": "red"}
    assert choice.require == {"big": ""}


@pytest.mark.parametrize("value", ["env:OPENAI_KEY", "file:/run/secrets/key"])
def test_references_to_secrets_travel_as_they_are(value: str) -> None:
    choice = engine_choice(spec(pretrained_model_type="saas/openai", infer_params={"saas.api_key": value}))

    assert (choice.params, choice.secrets) == ({"api_key": value}, {})


@pytest.mark.parametrize(
    "name",
    ["saas.api_key", "token", "hf_token", "saas.secret_key", "saas.access_token", "password", "saas.api_secret", "key"],
)
def test_names_of_secrets_are_known(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize("name", ["saas.model", "max_tokens", "backend.tokenizer", "monkey", "saas.base_url"])
def test_ordinary_names_are_no_secrets(name: str) -> None:
    assert not is_secret(name, "http://host:1/v1")


def test_a_url_that_holds_a_password_is_a_secret() -> None:
    assert is_secret("saas.proxies", "http://user:pass@proxy:3128")


def test_neither_the_spec_nor_the_choice_shows_a_secret() -> None:
    asked = spec(pretrained_model_type="saas/openai", infer_params={"saas.api_key": "sk-plain", "saas.model": "gpt"})

    assert "sk-plain" not in f"{asked!r} {engine_choice(asked)!r} {masked(asked.infer_params)}"
    assert "gpt" in repr(asked)


def test_pairs_are_split_at_the_first_equals_sign() -> None:
    assert parse_params(["a=b=c", "d="]) == {"a": "b=c", "d": ""}


@pytest.mark.parametrize("pairs", [["sk-plain"], ["=sk-plain"], ["a=1", "a=sk-plain"]])
def test_a_pair_that_cannot_be_read_is_refused_without_showing_it(pairs: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_params(pairs)

    assert "sk-plain" not in str(caught.value)
