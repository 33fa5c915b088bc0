"""Models that read images: a small LLaVA of random weights, real pictures, and what is refused."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web
from modelbus_broker.errors import InvalidRequest, UnsupportedField
from modelbus_broker.messages import (
    AudioData,
    AudioPart,
    Chat,
    ChatMessage,
)
from modelbus_workers.engines.base import EngineConfig

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")

from modelbus_workers.engines.torch_model.batch import Decoder  # noqa: E402
from modelbus_workers.engines.transformers import TransformersEngine  # noqa: E402

from tests.helpers.command_line import free_port  # noqa: E402
from tests.helpers.pictures import TEXT, data_url, picture, question, tiny_llava  # noqa: E402
from tests.workers.engines.contract import ask, goes_on_anywhere  # noqa: E402

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(llava: Path) -> AsyncIterator[TransformersEngine]:
    params = {
        "num_threads": "1", "dtype": "float32", "device": "cpu", "max_images": "2", "max_image_mb": "1",
        "continuous_batching": "true", "allowed_media_domains": "127.0.0.1, pictures.example",
    }  # fmt: skip
    made = TransformersEngine(EngineConfig(model="m", model_path=str(llava), params=params))
    await made.start()
    yield made
    await made.close()


RED, BLUE = data_url(picture("red")), data_url(picture("blue", "JPEG"), "jpeg")


async def test_an_answer_is_that_of_the_library_and_depends_on_the_picture(
    engine: TransformersEngine, llava: Path
) -> None:
    assert engine.capabilities().vision
    plain, red = await ask(engine, question()), await ask(engine, question(RED))
    assert red.prompt_tokens == (plain.prompt_tokens or 0) + 4
    both = await ask(engine, question(RED, BLUE, text="And these?"))
    assert len({str(answer.token_ids) for answer in (plain, red, both, await ask(engine, question(BLUE)))}) == 4

    processor = transformers.AutoProcessor.from_pretrained(llava)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(llava, dtype=torch.float32).eval()
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True)
    inputs = processor(text=[text], images=[Image.open(io.BytesIO(picture("red")))], return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert red.token_ids[0] == made[0, inputs["input_ids"].shape[1] :].tolist()


async def test_answers_about_pictures_go_on_and_do_not_feel_each_other(engine: TransformersEngine) -> None:
    await goes_on_anywhere(engine, question(RED))
    tasks = [question(RED), question(BLUE), question(), question(BLUE, RED)]
    alone = [(await ask(engine, task)).token_ids for task in tasks]
    together = await asyncio.gather(*(ask(engine, task) for task in tasks))
    assert [answer.token_ids for answer in together] == alone


async def test_pictures_are_fetched_only_from_hosts_that_the_deployment_names(
    engine: TransformersEngine, port: int
) -> None:
    async def red(request: web.Request) -> web.Response:
        return web.Response(body=picture("red"), content_type="image/png")

    async def away(request: web.Request) -> web.Response:
        raise web.HTTPFound(f"http://localhost:{port}/red.png")

    async def large(request: web.Request) -> web.Response:
        return web.Response(body=b"x" * (2 << 20))

    app = web.Application()
    app.add_routes([web.get("/red.png", red), web.get("/away", away), web.get("/large", large)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    base = f"http://127.0.0.1:{port}"
    try:
        assert (await ask(engine, question(f"{base}/red.png"))).texts == (await ask(engine, question(RED))).texts
        for url, words in {
            f"{base}/none.png": "the image's server answered 404",
            # Whoever is named must not send the worker elsewhere.
            f"{base}/away": "the image's server answered 302",
            f"{base}/large": "larger than 1 MiB",
            f"http://localhost:{port}/red.png": "images are not fetched from 'localhost'",
            "https://elsewhere.example/a.png": "allowed_media_domains",
            "file:///etc/passwd": "images are not fetched from",
        }.items():
            with pytest.raises(InvalidRequest, match=words) as refused:
                await ask(engine, question(url))
            assert refused.value.param == "messages[0].content[0].image_url"
    finally:
        await runner.cleanup()


async def test_what_is_no_picture_is_refused_with_its_place(engine: TransformersEngine) -> None:
    wrong = {
        data_url(b"no picture at all"): "cannot be read as PNG, JPEG, WEBP, GIF",
        data_url(picture("red")[:60]): "cannot be read",
        data_url(picture("red", "TIFF")): "cannot be read",
        data_url(picture("red", size=(10_000, 6_000))): "10000 x 6000 pixels",
        data_url(b"x" * (2 << 20)): "larger than 1 MiB",
        "data:image/png,abc": "has the form data:image/png;base64",
        "data:image/png;base64,a b": "no base64",
    }
    for url, words in wrong.items():
        with pytest.raises(InvalidRequest, match=words) as refused:
            await ask(engine, question(RED, url))
        assert refused.value.param == "messages[0].content[1].image_url"
    with pytest.raises(InvalidRequest, match="at most 2 images"):
        await ask(engine, question(RED, RED, RED))
    with pytest.raises(InvalidRequest, match="'<image>' stands for an image"):
        await ask(engine, question(RED, text="<image>"))
    message = ChatMessage(role="user", content=[AudioPart(input_audio=AudioData(data="", format="wav"))])
    with pytest.raises(UnsupportedField, match="reads text and images only, not input_audio"):
        await ask(engine, Chat(messages=[message]))


async def test_positions_that_images_moved_stay_with_their_sequence() -> None:
    text = TEXT | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 14}
    torch.manual_seed(0)
    config = transformers.Qwen2VLConfig(
        text_config={"vocab_size": 64, **text}, vision_config=vision, image_token_id=60, video_token_id=61,
        vision_start_token_id=62, vision_end_token_id=63,
    )  # fmt: skip
    model = transformers.Qwen2VLForConditionalGeneration(config).eval()
    decoder = Decoder(model, lambda: None)
    assert not decoder.together
    seeing = [5, 62, *[60] * 12, 63, 7]  # of 6 x 8 patches, four of them a token
    features = {
        "pixel_values": torch.rand(48, 3 * 2 * 14 * 14), "image_grid_thw": torch.tensor([[1, 6, 8]]),
        "mm_token_type_ids": torch.tensor([[int(token == 60) for token in seeing]]),
    }  # fmt: skip

    def alone(tokens: list[int], features: dict[str, Any]) -> list[Any]:
        rows, cache = decoder.forward(tokens, None, features=features)
        found = [rows[-1]]
        for token in (11, 12):
            rows, cache = decoder.forward([token], cache)
            found.append(rows[-1])
        return found

    with torch.inference_mode():
        # The one without images first: nothing has moved any position by then.
        plain = alone([3, 4, 5, 6], {})
        expected = alone(seeing, features), plain
        rows, cache = decoder.forward(seeing, None, features=features)
        others, other = decoder.forward([3, 4, 5, 6], None)
        found: tuple[list[Any], list[Any]] = ([rows[-1]], [others[-1]])
        for token in (11, 12):
            rows, cache = decoder.forward([token], cache)
            others, other = decoder.forward([token], other)
            found[0].append(rows[-1])
            found[1].append(others[-1])
    for one, same in zip([*expected[0], *expected[1]], [*found[0], *found[1]], strict=True):
        assert torch.equal(one, same)
