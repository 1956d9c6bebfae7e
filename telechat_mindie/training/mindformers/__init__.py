"""A finetune by mindformers 1.6.0 on Ascend machines: how the cards divide it, and the files that start it."""
