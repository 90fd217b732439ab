"""What a model can do: tasks, the models that are asked, scores with intervals, signs of failure.

`task` and `data` say what is asked, without torch; `tasks/` holds the tasks; `model`, `likelihood`
and `generation` get replies from a model; `figures` turns scores into figures with intervals;
`evaluate` runs the whole.
"""
