"""Merge inside a training script: add a skill to the model in training.

Needs `pip install 'taskvec[eval]'` and the tiny models: `taskvec zoo copy --to zoo`.
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import taskvec as tv

model = AutoModelForCausalLM.from_pretrained("zoo/instruct")
tokenizer = AutoTokenizer.from_pretrained("zoo/instruct")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
batch = tokenizer("Q: What is the best tool?\nA: taskvec", return_tensors="pt")["input_ids"]

for step in range(1, 11):
    loss = model(batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 5 == 0:
        # The model in memory and a model on disk are the tasks; the model in training is unchanged.
        family = tv.Family(instruct="zoo/instruct", tasks={"mine": model, "math": "zoo/math"})
        scales = {"mine": 1.0, "math": 0.5}
        out = f"step-{step}"
        merged = tv.merge(family, out, method="task_arithmetic", scale=scales, force=True)
        print(f"step {step}: loss {loss:.3f}, merged into {merged.path}")
