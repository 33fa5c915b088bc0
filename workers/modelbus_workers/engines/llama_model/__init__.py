"""What the ``llama_cpp`` engine is made of; the text side is that of ``torch_model``, which needs no torch.

| module | what it does |
|---|---|
| ``settings`` | the parameters of a deployment, by the names of the library's ``Llama`` |
| ``library`` | the library's log, and loading a model and its context |
| ``vocabulary`` | text to tokens and back, and the chat template |
| ``decoding`` | one step of the library: tokens go in, logits come out |
| ``sampling`` | logits become one token |
| ``loop`` | the thread that runs all requests |
| ``embedding`` | texts become vectors |
"""
