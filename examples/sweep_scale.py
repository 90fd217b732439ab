"""Find the best λ for your own metric: merge in memory for every λ and measure.

Needs `pip install 'taskvec[eval,report]'` and the tiny models: `taskvec zoo copy --to zoo`.
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import taskvec as tv

QUESTIONS = {f"Q: {a} + {b}?\nA: ": str(a + b) for a, b in [(2, 3), (4, 4), (7, 1), (6, 9)]}


def log_likelihood(model, tokenizer):
    """Mean log-likelihood of the correct answers; higher is better."""
    total = 0.0
    for question, answer in QUESTIONS.items():
        start = len(tokenizer(question)["input_ids"])
        tokens = tokenizer(question + answer, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            scores = model(tokens).logits.log_softmax(-1)
        total += sum(float(scores[0, i - 1, tokens[0, i]]) for i in range(start, tokens.shape[1]))
    return total / len(QUESTIONS)


model = AutoModelForCausalLM.from_pretrained("zoo/instruct")
tokenizer = AutoTokenizer.from_pretrained("zoo/instruct")
family = tv.Family(base="zoo/base", instruct="zoo/instruct", tasks={"math": "zoo/math"})
table = tv.lata(tv.scan(family))  # the weights are read once for all λ

found = {}
for scale in (0.0, 0.25, 0.5, 0.75, 1.0):
    tv.merge(family, model, table=table, scale=scale)  # into the loaded model; no file is written
    found[scale] = tv.evaluate(model, [log_likelihood], tokenizer=tokenizer).to_pandas()["value"][0]
    print(f"λ = {scale:.2f}: {found[scale]:.3f}")

best = max(found, key=found.get)
print(f"best: λ = {best}")
tv.merge(family, "best", table=table, scale=best, force=True)
