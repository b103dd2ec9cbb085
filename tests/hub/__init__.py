"""A small server on localhost that speaks as much of the Hugging Face Hub's protocol as downloads need."""
