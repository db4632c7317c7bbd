"""What is done with a trained model: text from it (`generate`), and how well it knows a text (`scoring`)."""
