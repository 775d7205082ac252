"""Models: students, teachers, their weights and classes.

`student.build_student` and `teacher.build_teachers` make the models of a run, `factory.create_model` any model of timm.
"""
