"""Layer weights compared: LATA, data-free rivals, and weights fitted to prompts, over families."""
