"""The study of attention heads: does a prompt family decide which attention heads can go, and how many?

recipe.py says what is compared, cases.py lists it, judge.py draws and scores, run.py keeps one document of it all;
answers.py, plots.py and page.py read nothing but that document.
"""
