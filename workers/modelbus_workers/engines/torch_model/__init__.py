"""What the ``transformers`` engine is made of.

| module | what it does |
|---|---|
| ``settings`` | the parameters of a deployment |
| ``loading`` | a model's folder or file becomes a model and a tokenizer |
| ``fingerprint`` | what two workers must share to go on from each other's tokens |
| ``prompts`` | a task becomes token ids |
| ``plan`` | a request's sampling fields, checked and with the model's defaults |
| ``sampling`` | logits become one token |
| ``text`` | tokens become text; stop strings |
| ``generation`` | the steps of one request |
| ``loop`` | the thread that runs all requests step by step |
| ``embedding`` | texts become vectors |
"""
