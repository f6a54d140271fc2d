"""All that lies on disk: whole files, PEFT adapters and their fields."""
