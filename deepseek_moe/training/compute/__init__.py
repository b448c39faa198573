"""The plain model's functions, arranged for a GPU. None of them changes what is computed."""
