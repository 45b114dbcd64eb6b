"""What a model can do besides the edited facts: tasks of lm-eval, run in this process."""
