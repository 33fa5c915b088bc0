"""What the ``transformers`` engine is made of.

| module | what it does |
|---|---|
| ``settings`` | the parameters of a deployment |
| ``loading`` | a model's folder or file becomes a model and a tokenizer |
| ``adapters`` | LoRA adapters over the model |
| ``drafting`` | guesses at the next tokens |
| ``quantizing`` | weights in fewer bits |
| ``fingerprint`` | what two workers must share to go on from each other's tokens |
| ``images`` | the images of a conversation, within limits |
| ``prompts`` | a task becomes token ids |
| ``work`` | what the loop is asked to do for one request |
| ``plan`` | a request's sampling fields, checked and with the model's defaults |
| ``sampling`` | logits become one token |
| ``text`` | tokens become text; stop strings |
| ``call_formats`` | how models write tool calls: a table |
| ``call_parser`` | tool calls are told from text as it comes |
| ``tool_prompts`` | tools in the prompt of a model whose template knows none |
| ``answer_form`` | ``response_format`` and ``tool_choice`` become a grammar |
| ``grammar`` | which tokens a grammar allows next |
| ``choice`` | the text side of one choice |
| ``generation`` | the steps of one request |
| ``loop`` | the thread that runs all requests step by step |
| ``embedding`` | texts become vectors |
"""
