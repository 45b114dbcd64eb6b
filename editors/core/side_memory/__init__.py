"""What methods share that answer from a second weight beside a linear map: its parts, its training, its routing."""
