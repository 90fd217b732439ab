"""Scale the layers of a LoRA adapter by LATA's weights, and save the adapter.

Needs `pip install 'taskvec[train,report]'` and the tiny models: `taskvec zoo copy --to zoo`.
"""

from peft import PeftModel
from transformers import AutoModelForCausalLM

import taskvec as tv

# Use any LoRA adapter that was trained over the instruct model; this one is extracted.
whole = tv.Family(base="zoo/base", instruct="zoo/instruct", tasks={"math": "zoo/math"})
tv.extract(whole, "math-lora", form="lora", rank=8, rest="drop", force=True)

family = tv.Family(base="zoo/base", instruct="zoo/instruct", tasks={"math": "math-lora"})
table = tv.lata(tv.scan(family))

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("zoo/instruct"), "math-lora")
table.scale_adapter(model, 0.5)  # B of every layer becomes 0.5 · w_layer · B
model.save_pretrained("math-lora-weighed")
print(table.to_pandas().sort_values("weight").head(5).to_string(index=False))
