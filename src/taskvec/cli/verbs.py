"""Names of the verbs, in the order of the help, and what each does."""

from __future__ import annotations

VERBS = {
    "demo": "merge two skills and forget one, on tiny models that ship with taskvec",
    "scan": "read the weights of a family once; show how every task relates to instruction tuning",
    "plan": "show what a merge would read, write and need, from headers alone",
    "merge": "write a model with the skills of several fine-tunes",
    "forget": "write a model without the skills of some fine-tunes",
    "extract": "write a task vector as a file that is a task again, or as a LoRA adapter",
    "inspect": "show what a checkpoint, an adapter or a vector contains",
    "verify": "check a merged folder against its manifest",
    "clean": "remove what killed runs have left in a folder",
    "import": "convert a mergekit configuration to a recipe; list what differs",
    "eval": "measure models side by side, with confidence intervals",
    "search": "find the coefficients whose merge scores best on data",
    "sweep": "measure what one number of a recipe does, value by value",
    "pairs": "measure what each task of a recipe does to each other task in a merge",
    "propose": "propose λ and a scheme from the weights alone",
    "fit": "fit the weight of every layer to a few prompts",
    "finetune": "train part of a model; the change is a task vector",
    "disentangle": "measure how task vectors interact, add up and can be subtracted",
    "report": "put everything that was measured on one page that opens anywhere",
    "methods": "list the methods and their parameters",
    "zoo": "list or copy the tiny models that ship with taskvec",
    "schema": "print the JSON schema of recipes, for editors",
    "completion": "print the completion script of a shell",
    "help": "show the help of a verb",
}
