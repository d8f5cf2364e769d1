"""The study of docs/study.md: do AttnRL and its parts help, and does attention tell where?"""
