"""What the routed experts of a checkpoint do: measured, shown, chosen, left out."""
