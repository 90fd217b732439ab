"""Similarity of each task to instruction tuning, layer by layer, as a pandas DataFrame.

Needs `pip install 'taskvec[report]'` and the tiny models: `taskvec zoo copy --to zoo`.
"""

import taskvec as tv

family = tv.Family(
    base="zoo/base",
    instruct="zoo/instruct",
    tasks={"math": "zoo/math", "code": "zoo/code"},
)
frame = tv.scan(family).to_pandas()  # one row for each task and tensor

by_module = frame.pivot_table("similarity", index="module", columns="task")
print(by_module.round(4))

# The tensors in which math differs most from instruction tuning.
math = frame[frame["task"] == "math"].nsmallest(5, "similarity")
print(math[["layer", "similarity", "norm_ratio"]].to_string(index=False))
