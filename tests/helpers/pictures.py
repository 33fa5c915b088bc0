"""Pictures, questions about them, and a small model that reads them."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from modelbus_broker.messages import Chat, ChatMessage, ImagePart, ImageURL, Part, Sampling, TextPart

from .smollm2 import smollm2_with

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}"
    "{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip


def tiny_llava(folder: Path) -> Path:
    """A LLaVA of random weights: four tokens for each image of 28 x 28 pixels."""
    import torch
    import transformers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = transformers.AutoTokenizer.from_pretrained(
        smollm2_with(folder / "tokenizer", template=TEMPLATE, words={"<image>": True})
    )
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(vocab_size=49152, **TEXT),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = transformers.LlavaProcessor(
        pictures, tokenizer, patch_size=14, vision_feature_select_strategy="default", chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for weights in model.model.multi_modal_projector.parameters():
            weights.mul_(30)  # so that pictures are not drowned by words
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder / "model"


def tiny_idefics(folder: Path) -> Path:
    """An Idefics3 of random weights, which needs no torchvision in vLLM either: one token for each image, and three around it."""
    import torch
    import transformers
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    words = dict.fromkeys(("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"), True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        smollm2_with(folder / "tokenizer", template=TEMPLATE, words=words)
    )
    torch.manual_seed(0)
    text = TEXT | {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.Idefics3Config(
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": 28, "patch_size": 14,
        },
        text_config=transformers.LlamaConfig(vocab_size=49152, **text), scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), pad_token_id=2,
    )  # fmt: skip
    pictures = Idefics3ImageProcessorPil(
        do_image_splitting=False, size={"longest_edge": 28}, max_image_size={"longest_edge": 28}
    )
    processor = transformers.Idefics3Processor(pictures, tokenizer, image_seq_len=1, chat_template=TEMPLATE)
    model = transformers.Idefics3ForConditionalGeneration(config)
    with torch.no_grad():
        for weights in model.model.connector.parameters():
            weights.mul_(30)  # so that pictures are not drowned by words
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder / "model"


def picture(colour: str, kind: str = "PNG", size: tuple[int, int] = (40, 30)) -> bytes:
    """The bytes of a file with one colour."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return file.getvalue()


def data_url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def question(*urls: str, text: str = "What is this?", max_tokens: int = 6) -> Chat:
    parts: list[Part] = [ImagePart(image_url=ImageURL(url=url)) for url in urls]
    message = ChatMessage(role="user", content=[*parts, TextPart(text=text)])
    return Chat(messages=[message], sampling=Sampling(temperature=0.0, max_tokens=max_tokens, ignore_eos=True))
