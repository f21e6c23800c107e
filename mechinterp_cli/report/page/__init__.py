"""One self-contained page of one run or several: what was asked, the answer, figures, prompts, how to repeat it."""
