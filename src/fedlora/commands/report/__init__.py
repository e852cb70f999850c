"""Turns runs into one page, or into pictures for a paper: `fedlora report`.

reading     a run's directory, whatever of it is there
spectrum    singular values of the saved global update
series      runs that differ by their seed alone, and what they are called
collect     all numbers of the report, the same for the page and the pictures
page        one HTML file that needs nothing else
figures     PNG and PDF
"""
