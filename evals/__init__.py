"""What a model can do: held-out text, needles in haystacks, loss by position and the experts' load."""
