"""What methods of one family share: locate then edit, mass editing, fine-tuning, trained editors."""
