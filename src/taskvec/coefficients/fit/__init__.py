"""Layer weights fitted to a few prompts.

    min over w  Σ_s ω_s E_{x ∈ prompts of s} KL(p(· | x; teacher_s) ‖ p(· | x; θ(w)))
    θ(w) = θ_target + Σ_t Σ_l w_{t,l} τ_{t,l}          ∂/∂w_{t,l} = ⟨∂L/∂θ_l, τ_{t,l}⟩

Reading order: `api` (the verb), `directions` (a recipe's members and task vectors), `steering` (a
module that is put to θ(w), and slopes along τ), `prompts` and `teaching` (what is asked, and what
teachers say), `asking` and `losses` (what the module says to it), `descent` (Adam), `held_out`
(what it is worth), `explanation` (what fitted weights go with), `fitted` (result and files).
"""
