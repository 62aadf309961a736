"""Shoal inside other people's frameworks: one file each, thin, over the public SDK, an extra of the package.

pip install 'shoal[inspect]'      inspect_ai.py, a sandbox for Inspect's evaluations
pip install 'shoal[langchain]'    langchain.py, a backend for LangChain's deep agents
"""
